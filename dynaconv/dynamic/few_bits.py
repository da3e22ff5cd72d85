"""The few-bit copy of an FFN's weights: what sketch routers rank neurons by, and what low-bit values are.

It is made from the weights, and made anew when they change, so it needs no training, is not saved, and follows a model
that is fine-tuned. Ships with every exported model. D residual width, F neurons.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynaconv.dynamic.cost import FFNShape
from dynaconv.dynamic.layout import CopyLayout
from dynaconv.kernels.codes import Codes, bytes_a_row
from dynaconv.kernels.weights import FFNWeights


class FewBitCopy:
    """The copy of one FFN, as dense matrices in the weights' own dtype.

    Each neuron's rows of gate and up, and its column of down, are encoded by themselves, so that single neurons can be
    read.

    Args:
        layout: How it is made.
        bits: Planes that the router reads in all, at most those of the layout.
        coarse: Planes that its first look reads, of gate alone (of up, where there is no gate); at most ``bits``.

    Attributes:
        first: What the first look reads, (F, D).
        second: What the second look reads of gate and up, (F, D) each; no gate where the FFN has none.
        norms: Of the columns of down, (F,) float32.
        low: Low-bit values; ``None`` where tokens do not use them.
    """

    first: Tensor
    second: tuple[Tensor | None, Tensor]
    norms: Tensor

    def __init__(self, layout: CopyLayout, bits: int, coarse: int) -> None:
        self.layout, self.bits, self.coarse = layout, bits, coarse
        self._made_from: tuple[Any, ...] | None = None
        self.low: FFNWeights | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The matrices are made again, from the weights that it will be used with.
        return {"layout": self.layout, "bits": self.bits, "coarse": self.coarse}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @torch.no_grad()
    def follow(self, weights: FFNWeights) -> None:
        """Makes the copy of ``weights``, where it is not their copy already."""
        identity = tuple(map(_identity, (weights.gate, weights.up, weights.down)))
        if identity == self._made_from:
            return
        dtype, bits, group = weights.up.dtype, self.layout.bits, self.layout.group
        gate, up = (None if one is None else Codes.of(one.detach(), bits, group) for one in (weights.gate, weights.up))
        assert up is not None
        self.second = (None if gate is None else gate.values(self.bits, dtype), up.values(self.bits, dtype))
        self.first = (gate or up).values(self.coarse, dtype)
        self.norms = norms(weights.down, dim=0)
        if self.layout.values:
            down = Codes.of(weights.down.detach().t(), bits, group)
            self.low = weights._replace(
                gate=None if gate is None else gate.values(dtype=dtype),
                up=up.values(dtype=dtype),
                down=down.values(dtype=dtype).t(),
            )
        self._made_from = identity

    def forget(self) -> None:
        """Makes the copy anew the next time, for weights that change without a trace (DeepSpeed's)."""
        self._made_from = None

    def values(self, weights: FFNWeights) -> FFNWeights:
        """Low-bit values with the gradient of ``weights`` (straight-through estimator)."""
        low = self.low
        assert low is not None
        if not (torch.is_grad_enabled() and weights.requires_grad):
            return low
        gate = None if low.gate is None or weights.gate is None else _straight_through(weights.gate, low.gate)
        return weights._replace(
            gate=gate, up=_straight_through(weights.up, low.up), down=_straight_through(weights.down, low.down)
        )

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


def _identity(weight: Tensor | None) -> tuple[Any, ...] | None:
    if weight is None:
        return None
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.dtype, weight.device


def _straight_through(weight: Tensor, value: Tensor) -> Tensor:
    return weight + (value - weight).detach()
