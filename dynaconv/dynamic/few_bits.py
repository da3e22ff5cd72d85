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
    """The copy of one FFN: codes, and of those that are read as matrices, these, in the dtype that is computed in.

    Each neuron's rows of gate and up, and its column of down, are encoded by themselves, so that single neurons can be
    read.

    Args:
        layout: How it is made.
        bits: Planes that the router reads in all, at most those of the layout.
        coarse: Planes that its first look reads, of gate alone (of up, where there is no gate); at most ``bits``.

    Attributes:
        norms: Of the columns of down, (F,) float32.
        packed: Whether it is held as codes, and nothing else is left of the weights.
        rounding: What each look's rounding adds to a weight that the activation sees, root mean square, (2,) float32;
            ``None`` where the activation is not flat below 0 (:func:`is_flat`).
    """

    norms: Tensor
    rounding: Tensor | None

    def __init__(self, layout: CopyLayout, bits: int, coarse: int) -> None:
        self.layout, self.bits, self.coarse = layout, bits, coarse
        self.packed = False
        self._made_from: tuple[Any, ...] | None = None
        self._codes: _FFNCodes | None = None
        self._decoded: dict[tuple[str, torch.dtype], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Made again, from the weights that it will be used with; of packed ones, codes are all there is.
        kept = (self._codes, self.norms, self.rounding) if self.packed else None
        return {"layout": self.layout, "bits": self.bits, "coarse": self.coarse, "kept": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept = state.pop("kept")
        self.__init__(**state)  # type: ignore[misc]
        if kept is not None:
            (self._codes, self.norms, self.rounding), self.packed = kept, True

    @torch.no_grad()
    def follow(self, weights: FFNWeights) -> None:
        """Makes the copy of ``weights``, where it is not their copy already."""
        identity = tuple(map(_identity, (weights.gate, weights.up, weights.down)))
        if self.packed or identity == self._made_from:
            return
        self._codes, self._made_from = self._encoded(weights), identity
        self._decoded.clear()

    @torch.no_grad()
    def pack(self, weights: FFNWeights) -> None:
        """Keeps the codes of ``weights`` alone, and decodes them each time they are used: slower, in less memory."""
        self._codes, self.packed = self._encoded(weights), True
        self._decoded.clear()

    def move(self, device: torch.device) -> None:
        """Puts the codes on ``device``, where they are all there is."""
        if self.packed and self.norms.device != device:
            gate, up, down = (None if one is None else one.to(device) for one in self.codes)
            assert up is not None
            self._codes, self.norms = (gate, up, down), self.norms.to(device)
            self.rounding = None if self.rounding is None else self.rounding.to(device)

    @property
    def made(self) -> bool:
        """Whether it was made, and is not to be made anew."""
        return self._made_from is not None

    @property
    def codes(self) -> _FFNCodes:
        """Codes of gate, up and down, whose rows are neurons; no gate or down where there is none."""
        assert self._codes is not None, "the copy is made before it is read"
        return self._codes

    def first(self, dtype: torch.dtype) -> Tensor:
        """What the router's first look reads, (F, D)."""
        gate, up, _ = self.codes
        return self._kept("first", dtype, lambda: (gate or up).values(self.coarse, dtype))

    def second(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
        """What its second look reads of gate and up, (F, D) each; no gate where the FFN has none."""
        gate, up, _ = self.codes

        def decode() -> tuple[Tensor | None, Tensor]:
            return None if gate is None else gate.values(self.bits, dtype), up.values(self.bits, dtype)

        return self._kept("second", dtype, decode)

    def low(self, weights: FFNWeights) -> FFNWeights:
        """Low-bit values, with the gradient of ``weights`` where one is recorded (straight-through estimator)."""
        dtype = computed_dtype(weights.up)
        gate, up, down = self._kept("low", dtype, lambda: self._low(dtype))
        low = weights._replace(gate=gate, up=up, down=down)
        if self.packed or not (torch.is_grad_enabled() and weights.requires_grad):
            return low
        gate = None if low.gate is None or weights.gate is None else _straight_through(weights.gate, low.gate)
        return weights._replace(
            gate=gate, up=_straight_through(weights.up, low.up), down=_straight_through(weights.down, low.down)
        )

    def _low(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor, Tensor]:
        gate, up, down = self.codes
        assert down is not None, "the copy has no low-bit values"
        return None if gate is None else gate.values(dtype=dtype), up.values(dtype=dtype), down.values(dtype=dtype).t()

    def _kept(self, name: str, dtype: torch.dtype, decode: Callable[[], _T]) -> _T:
        """What ``decode`` gives, kept unless the copy is to take little memory."""
        if self.packed:
            return decode()
        if (name, dtype) not in self._decoded:
            with torch.no_grad():
                self._decoded[name, dtype] = decode()
        kept: _T = self._decoded[name, dtype]
        return kept

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

    def release(self) -> None:
        """Lets go of decoded matrices; they are made again when they are read."""
        self._decoded.clear()

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


def version(tensor: Tensor) -> int:
    """How often ``tensor`` was changed in place, as far as it keeps count."""
    return 0 if tensor.is_inference() else tensor._version


def _identity(weight: Tensor | None) -> tuple[Any, ...] | None:
    if weight is None:
        return None
    fetched = getattr(weight if weight._base is None else weight._base, "kept_as", None)
    if fetched is not None:  # by accelerate, for this call
        return (*fetched, weight.storage_offset(), weight.dtype, weight.device)
    return weight.data_ptr(), version(weight), weight.dtype, weight.device


def _straight_through(weight: Tensor, value: Tensor) -> Tensor:
    return weight + (value - weight).detach()
