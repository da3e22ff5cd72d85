"""What a kernel backend is. Ships with every exported model. M tokens, D residual width."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Choice


class Backend(NamedTuple):
    """A way to compute an FFN of which each token uses some blocks.

    Attributes:
        name: For messages.
        can_run: Whether it serves these arguments, and why or why not in a few words. It looks at types, devices and
            shapes only, never at values: on a GPU that would wait for the device.
        run: The FFN ``(M, D)`` of tokens ``x`` (M, D).
        variant: Which of its kernels :attr:`run` would take; it may look at values.
    """

    name: str
    can_run: Callable[[BlockedFFN, Tensor, Choice], tuple[bool, str]]
    run: Callable[[BlockedFFN, Tensor, Choice], Tensor]
    variant: Callable[[BlockedFFN, Tensor, Choice], str] = lambda ffn, x, choice: ""


def cpu_inference(ffn: BlockedFFN, x: Tensor) -> tuple[bool, str] | None:
    """What a backend for inference on a CPU answers to arguments that are not that; ``None`` where they are.

    None of them reads low-bit values or adds the means of neurons that are off.
    """
    if not x.is_cpu:
        return False, "tensors are not on the CPU"
    if ffn.records_gradient(x):
        return False, "gradients are recorded, and this backend is for inference"
    if ffn.low is not None or ffn.mean is not None:
        return False, "the network has low-bit values, or neurons that give their mean"
    return None
