"""The few-bit copy of an FFN's weights: what sketch routers rank neurons by, and what low-bit values are.

It is made from the weights, and made anew when they change, so it needs no training, is not saved, and follows a model
that is fine-tuned. Ships with every exported model. D residual width, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from dynaconv.dynamic.cost import FFNShape
from dynaconv.dynamic.layout import CopyLayout
from dynaconv.kernels.codes import Codes, bytes_a_row
from dynaconv.kernels.weights import FFNWeights

_T = TypeVar("_T")
_FFNCodes = tuple[Codes | None, Codes, Codes | None]  # of gate, up and down


class FewBitCopy:
    """The copy of one FFN, as dense matrices in the dtype that is computed in: the weights' own, or autocast's.

    Each neuron's rows of gate and up, and its column of down, are encoded by themselves, so that single neurons can be
    read.

    Args:
        layout: How it is made.
        bits: Planes that the router reads in all, at most those of the layout.
        coarse: Planes that its first look reads, of gate alone (of up, where there is no gate); at most ``bits``.

    Attributes:
        norms: Of the columns of down, (F,) float32.
        rounding: What each look's rounding adds to a weight that the activation sees, root mean square, (2,) float32;
            ``None`` where the activation is not flat below 0 (:func:`is_flat`).
    """

    norms: Tensor
    rounding: Tensor | None

    def __init__(self, layout: CopyLayout, bits: int, coarse: int) -> None:
        self.layout, self.bits, self.coarse = layout, bits, coarse
        self._made_from: tuple[Any, ...] | None = None
        self._codes: _FFNCodes | None = None
        self._first: Tensor | None = None
        self._second: tuple[Tensor | None, Tensor] | None = None
        self._low: FFNWeights | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The matrices are made again, from the weights that it will be used with; codes are all there is of them.
        kept = None if self._codes is None else (self._codes, self.norms, self.rounding)
        return {"layout": self.layout, "bits": self.bits, "coarse": self.coarse, "kept": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept = state.pop("kept")
        self.__init__(**state)  # type: ignore[misc]
        if kept is not None:
            self._codes, self.norms, self.rounding = kept

    @property
    def packed(self) -> bool:
        """Whether it is held as codes, and nothing else is left of the weights."""
        return self._codes is not None

    @torch.no_grad()
    def follow(self, weights: FFNWeights) -> None:
        """Makes the copy of ``weights``, where it is not their copy already."""
        dtype = computed_dtype(weights.up)
        identity = (dtype, *map(_identity, (weights.gate, weights.up, weights.down)))
        if self.packed or identity == self._made_from:
            return
        codes = self._encoded(weights)
        self._first, self._second = self._read_first(codes, dtype), self._read_second(codes, dtype)
        self._low = self._read_low(codes, weights)
        self._made_from = identity

    @torch.no_grad()
    def pack(self, weights: FFNWeights) -> None:
        """Keeps the codes of ``weights`` alone, and decodes them each time they are used: slower, in less memory."""
        self._codes = self._encoded(weights)
        self._first = self._second = self._low = None

    def move(self, device: torch.device) -> None:
        """Puts the codes on ``device``, where they are all there is."""
        if self._codes is not None and self.norms.device != device:
            gate, up, down = (None if one is None else one.to(device) for one in self._codes)
            assert up is not None
            self._codes, self.norms = (gate, up, down), self.norms.to(device)
            self.rounding = None if self.rounding is None else self.rounding.to(device)

    def first(self, dtype: torch.dtype) -> Tensor:
        """What the router's first look reads, (F, D)."""
        return self._read_first(self._codes, dtype) if self._codes is not None else _made(self._first)

    def second(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
        """What its second look reads of gate and up, (F, D) each; no gate where the FFN has none."""
        return self._read_second(self._codes, dtype) if self._codes is not None else _made(self._second)

    def low(self, weights: FFNWeights) -> FFNWeights:
        """Low-bit values, with the gradient of ``weights`` where one is recorded (straight-through estimator)."""
        if self._codes is not None:
            return _made(self._read_low(self._codes, weights))
        low = _made(self._low)
        if not (torch.is_grad_enabled() and weights.requires_grad):
            return low
        gate = None if low.gate is None or weights.gate is None else _straight_through(weights.gate, low.gate)
        return weights._replace(
            gate=gate, up=_straight_through(weights.up, low.up), down=_straight_through(weights.down, low.down)
        )

    def _encoded(self, weights: FFNWeights) -> _FFNCodes:
        self.norms = norms(weights.down.detach(), dim=0)
        bits, group = self.layout.bits, self.layout.group
        gate = None if weights.gate is None else Codes.of(weights.gate.detach(), bits, group)
        down = Codes.of(weights.down.detach().t(), bits, group) if self.layout.values else None
        up, self.rounding = Codes.of(weights.up.detach(), bits, group), None
        if is_flat(weights.activation):
            seen, codes = (weights.up, up) if weights.gate is None or gate is None else (weights.gate, gate)
            errors = [codes.values(planes) - seen.detach().float() for planes in (self.coarse, self.bits)]
            self.rounding = torch.stack([error.square().mean().sqrt() for error in errors])
        return gate, up, down

    def _read_first(self, codes: _FFNCodes, dtype: torch.dtype) -> Tensor:
        return (codes[0] or codes[1]).values(self.coarse, dtype)

    def _read_second(self, codes: _FFNCodes, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
        gate, up, _ = codes
        return None if gate is None else gate.values(self.bits, dtype), up.values(self.bits, dtype)

    def _read_low(self, codes: _FFNCodes, weights: FFNWeights) -> FFNWeights | None:
        (gate, up, down), dtype = codes, computed_dtype(weights.up)
        if down is None:
            return None
        return weights._replace(
            gate=None if gate is None else gate.values(dtype=dtype),
            up=up.values(dtype=dtype),
            down=down.values(dtype=dtype).t(),
        )

    def forget(self) -> None:
        """Makes the copy anew the next time, for weights that change without a trace (DeepSpeed's)."""
        self._made_from = None

    def first_cost(self, shape: FFNShape) -> tuple[float, float]:
        """Bytes and FLOPs of the router's first look at all neurons, for one token; 2 bytes for the size of each."""
        row = bytes_a_row(shape.residual, self.coarse, self.layout.group)
        return shape.neurons * (row + 2), 2.0 * shape.neurons * shape.residual

    def second_cost(self, shape: FFNShape) -> tuple[float, float]:
        """Bytes and FLOPs of the router's second look at one neuron; 2 bytes for its size."""
        further = self.bits - self.coarse
        planes = bytes_a_row(shape.residual, further, self.layout.group, further=True)
        up = bytes_a_row(shape.residual, self.bits, self.layout.group) if shape.inputs == 2 else 0.0
        return planes + up + 2, 2.0 * shape.residual * (bool(further) + bool(up))

    def low_cost(self, shape: FFNShape) -> tuple[float, float]:
        """Bytes and FLOPs of one neuron with low-bit values, beside what the router has read of it."""
        further = self.layout.bits - self.bits
        inputs = shape.inputs * bytes_a_row(shape.residual, further, self.layout.group, further=True)
        again = shape.inputs if further else 0  # products with the router's planes serve where there are no more
        down = bytes_a_row(shape.residual, self.layout.bits, self.layout.group)
        return inputs + down, 2.0 * (again + 1) * shape.residual


def _made(part: _T | None) -> _T:
    assert part is not None, "the copy is made before it is read"
    return part


def norms(vectors: Tensor, dim: int, *, keepdim: bool = False) -> Tensor:
    """Euclidean norms along ``dim``, float32, of vectors of any floating dtype."""
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    return torch.linalg.vector_norm(vectors, dim=dim, keepdim=keepdim, dtype=dtype).float()


def is_flat(activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether a neuron gives nothing at all below 0, as ReLU and its square."""
    return not bool(activation(torch.full((1,), -1.0)).any())


def computed_dtype(weight: Tensor) -> torch.dtype:
    """What products with ``weight`` are computed in: autocast's dtype where it is on."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _identity(weight: Tensor | None) -> tuple[Any, ...] | None:
    if weight is None:
        return None
    version = 0 if weight.is_inference() else weight._version
    fetched = getattr(weight if weight._base is None else weight._base, "kept_as", None)
    if fetched is not None:  # by accelerate, for this call
        return (*fetched, weight.storage_offset(), weight.dtype, weight.device)
    return weight.data_ptr(), version, weight.dtype, weight.device


def _straight_through(weight: Tensor, value: Tensor) -> Tensor:
    return weight + (value - weight).detach()
