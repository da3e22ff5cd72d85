"""What goes into modules of a stock model and what comes out of them, by forward hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


class Captured:
    """What passed the captured modules at their last call, by the name that was given to each.

    Attributes:
        inputs: First argument of each module of ``inputs``.
        outputs: Output of each module of ``outputs``.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Lets go of the tensors, which would stand in memory beside those of the next call."""
        self.inputs.clear()
        self.outputs.clear()


@contextmanager
def capture(
    *, inputs: Mapping[str, nn.Module] | None = None, outputs: Mapping[str, nn.Module] | None = None
) -> Iterator[Captured]:
    """Captures what goes into ``inputs`` and comes out of ``outputs``, for the duration of the block.

    Nothing is copied or detached: a captured output still has its graph.
    """
    captured, hooks = Captured(), []
    for name, module in (inputs or {}).items():
        hooks.append(
            module.register_forward_pre_hook(lambda _, args, name=name: captured.inputs.__setitem__(name, args[0]))
        )
    for name, module in (outputs or {}).items():
        hooks.append(
            module.register_forward_hook(lambda _, args, output, name=name: captured.outputs.__setitem__(name, output))
        )
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()
