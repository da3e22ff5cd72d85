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
        bits: Planes that the router reads, at most those of the layout.
        coarse: Those that it reads of all neurons, at most ``bits``.

    Attributes:
        sketches: What the router reads of gate and up, (F, D) each, in few planes and, where these are not all that it
            reads, in all; no gate where the FFN has none.
        norms: Of the columns of down, (F,) float32.
        low: Low-bit values; ``None`` where tokens do not use them.
    """

    sketches: list[tuple[Tensor | None, Tensor]]
    norms: Tensor

    def __init__(self, layout: CopyLayout, bits: int, coarse: int) -> None:
        self.layout, self.bits, self.coarse = layout, bits, coarse
        self._made_from: tuple[Any, ...] | None = None
        self.low: FFNWeights | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {
            "layout": self.layout,
            "bits": self.bits,
            "coarse": self.coarse,
        }  # made again from the weights it will be used with

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @torch.no_grad()
    def follow(self, weights: FFNWeights) -> None:
        """Makes the copy of ``weights``, where it is not their copy already."""
        identity = tuple(map(_identity, (weights.gate, weights.up, weights.down)))
        if identity == self._made_from:
            return
        dtype, gate, up = weights.up.dtype, None, Codes.of(weights.up.detach(), self.layout.bits, self.layout.group)
        if weights.gate is not None:
            gate = Codes.of(weights.gate.detach(), self.layout.bits, self.layout.group)
        self.sketches = [
            (None if gate is None else gate.values(read, dtype), up.values(read, dtype))
            for read in sorted({self.coarse, self.bits})
        ]
        self.norms = torch.linalg.vector_norm(weights.down, dim=0, dtype=torch.float32)
        if self.layout.values:
            down = Codes.of(weights.down.detach().t(), self.layout.bits, self.layout.group)
            self.low = weights._replace(
                gate=None if gate is None else gate.values(dtype=dtype),
                up=up.values(dtype=dtype),
                down=down.values(dtype=dtype).t(),
            )
        self._made_from = identity

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

    def sketch_cost(self, shape: FFNShape) -> tuple[float, float]:
        """Bytes and FLOPs of the router's first look at all neurons, for one token; 2 bytes for the norm of each."""
        row = bytes_a_row(shape.residual, self.coarse, self.layout.group)
        rows = shape.inputs * shape.neurons
        return rows * row + 2 * shape.neurons, 2.0 * rows * shape.residual

    def closer_cost(self, shape: FFNShape) -> tuple[float, float]:
        """Bytes and FLOPs of the router's second look at one neuron."""
        further = self.bits - self.coarse
        row = bytes_a_row(shape.residual, further, self.layout.group, further=True)
        return shape.inputs * row, 2.0 * shape.inputs * shape.residual if further else 0.0

    def low_cost(self, shape: FFNShape) -> tuple[float, float]:
        """Bytes and FLOPs of one neuron with low-bit values, beside what the router has read of it."""
        further = self.layout.bits - self.bits
        inputs = shape.inputs * bytes_a_row(shape.residual, further, self.layout.group, further=True)
        again = shape.inputs if further else 0  # products with the router's planes serve where there are no more
        down = bytes_a_row(shape.residual, self.layout.bits, self.layout.group)
        return inputs + down, 2.0 * (again + 1) * shape.residual


def _identity(weight: Tensor | None) -> tuple[Any, ...] | None:
    if weight is None:
        return None
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.dtype, weight.device


def _straight_through(weight: Tensor, value: Tensor) -> Tensor:
    return weight + (value - weight).detach()
