"""Whether the Triton kernels can serve a call, and what of its arguments they are told as numbers.

Imports no triton: modules that hold kernels do, and are imported when the first of them runs. Ships with every exported
model. M tokens, D residual width, F neurons.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dynaconv.kernels.weights import FFNWeights

OLDEST = (3, 6)
"""Release of triton from which on the kernels are known to compile."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOKENS = 4
"""Most tokens that one program computes together; more tokens are more programs, which read weights from the cache."""

DECODE_TOKENS = 16
"""Most tokens of a call to the decode kernels: beyond, hardly a neuron is used by none."""

_ACTIVATIONS = {
    "silu": 0,
    "swish": 0,
    "SiLU": 0,
    "SiLUActivation": 0,
    "gelu": 1,
    "GELU": 1,
    "GELUActivation": 1,
    "gelu_new": 2,
    "gelu_fast": 2,
    "gelu_pytorch_tanh": 2,
    "gelu_tanh": 2,
    "NewGELUActivation": 2,
    "FastGELUActivation": 2,
    "PytorchGELUTanh": 2,
    "GELUTanh": 2,
    "relu": 3,
    "ReLU": 3,
}


def activation_code(activation: str | Callable[[Tensor], Tensor]) -> int | None:
    """Number of a nonlinearity in the kernels: 0 SiLU, 1 GELU, 2 GELU by tanh, 3 ReLU; ``None``: they have it not.

    Args:
        activation: Its name in ``config.json``, or a function or module.
    """
    if isinstance(activation, str):
        return _ACTIVATIONS.get(activation)
    keywords: dict[str, Any] = {}
    if isinstance(activation, functools.partial):
        keywords, activation = activation.keywords, activation.func
    name = getattr(activation, "__name__", type(activation).__name__)
    code = _ACTIVATIONS.get(name)
    approximate = keywords.get("approximate", getattr(activation, "approximate", "none"))
    return 2 if code == 1 and approximate == "tanh" else code


def interpreted() -> bool:
    """Whether Triton was told to run kernels in Python, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _missing() -> str | None:
    """Why there is no triton that the kernels were tried with; ``None`` where there is."""
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        found = version("triton")
    except PackageNotFoundError:  # built under another name, as PyTorch's own
        return None
    old = tuple(map(int, found.split(".")[:2])) < OLDEST
    return f"triton is {found}, and the kernels need {OLDEST[0]}.{OLDEST[1]}" if old else None


def inference_on_gpu(weights: FFNWeights, x: Tensor) -> tuple[bool, str] | None:
    """What the backends answer to arguments that are not an inference call on a GPU; ``None`` where they are."""
    if not (x.is_cuda or (x.is_cpu and interpreted())):
        return False, "tensors are not on a GPU"
    missing = _missing()
    if missing is not None:
        return False, missing
    if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
        return False, "gradients are recorded, and this backend is for inference"
    if x.is_cuda and not interpreted() and torch.version.cuda and _capability(x.device.index) < 8:
        return False, "the GPU is older than compute capability 8.0"
    if x.dtype not in DTYPES or weights.up.dtype != x.dtype:
        return False, f"tokens are {x.dtype} and weights {weights.up.dtype}: one of {DTYPES} is needed for both"
    parts = [one for one in (weights.gate, weights.up) if one is not None]
    if any(one.stride(1) != 1 for one in parts) or len({one.stride(0) for one in parts}) > 1:
        return False, "rows of gate and up do not lie alike in memory"
    return None


@functools.cache
def _capability(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0]


def power_of_two(count: int) -> int:
    """The least power of two that is at least ``count``, from 1."""
    return 1 << max(0, count - 1).bit_length()


def row_stride(rows: Tensor | None) -> int:
    """How far rows lie apart; 0 where there is one for all, (C,), or none at all."""
    return rows.stride(0) if rows is not None and rows.dim() == 2 else 0


_rows: WeakIdKeyDictionary = WeakIdKeyDictionary()


def down_rows(weights: FFNWeights) -> Tensor:
    """Down with a neuron a row, (F, D): a view where it lies transposed in memory, otherwise a copy made once."""
    down = weights.down
    if down.stride(0) == 1:
        return down.t()
    now = _version(down)
    kept = _rows.get(down)
    if kept is None or kept[0] != now:
        kept = now, down.detach().t().contiguous()
        _rows[down] = kept
    return kept[1]


def _version(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
