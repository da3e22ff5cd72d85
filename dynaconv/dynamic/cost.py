"""What a token's use of an FFN costs, as a share of the parent's whole FFN. Ships with every exported model.

Everything that is read or computed counts: active neurons, the router (planes of a sketch with their scales, or the
weights of a trained router), the means of neurons that are off. D residual width, F neurons.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch import Tensor

_T = TypeVar("_T", Tensor, float)


class UnitCost(NamedTuple):
    """Cost in one unit, bytes or FLOPs, as shares of the parent's FFN.

    Attributes:
        fixed: Of every token below the full dial: the router, and what all neurons that are off add up to.
        exact: Of all neurons with exact values, on top.
        low: Of all neurons with low-bit values, on top.
        closer: Of the router's second look at all neurons, on top of ``fixed``.
    """

    fixed: float
    exact: float
    low: float = 0.0
    closer: float = 0.0

    def of(self, active: _T, exact: _T, closer: _T) -> _T:
        """Cost of tokens with these shares of neurons that are active, exact, and looked at twice, (...) each."""
        return self.fixed + self.exact * exact + self.low * (active - exact) + self.closer * closer


NEURONS = UnitCost(0.0, 1.0)
"""The share of neurons, routers not counted."""


class FFNCost(NamedTuple):
    """Cost of one site.

    Attributes:
        bytes: Bytes of weights read, at the checkpoint's dtype.
        flops: FLOPs computed.
    """

    bytes: UnitCost
    flops: UnitCost


class FFNShape(NamedTuple):
    """What costs follow from.

    Attributes:
        residual: D.
        neurons: F.
        inputs: Projections that read the FFN's input: 2 (gate and up) or 1.
        itemsize: Bytes of a weight in the checkpoint.
        biases: Elements of all biases.
    """

    residual: int
    neurons: int
    inputs: int
    itemsize: int
    biases: int = 0

    @property
    def bytes(self) -> float:
        """Of the whole FFN."""
        return float(self.itemsize * ((self.inputs + 1) * self.residual * self.neurons + self.biases))

    @property
    def flops(self) -> float:
        """Of the whole FFN, for one token."""
        return 2.0 * (self.inputs + 1) * self.residual * self.neurons


def ffn_cost(
    shape: FFNShape,
    *,
    router: tuple[float, float],
    closer: tuple[float, float] = (0.0, 0.0),
    low: tuple[float, float] = (0.0, 0.0),
    means: bool = False,
) -> FFNCost:
    """Shares of the FFN that ``shape`` describes.

    Args:
        shape: The parent's FFN.
        router: Bytes and FLOPs of the router, for one token.
        closer: Bytes and FLOPs of the router's second look at one neuron.
        low: Bytes and FLOPs of one neuron with low-bit values, beside what the router has read of it.
        means: Whether neurons that are off give their mean: then the sum of all means is read (D elements), and the
            mean of each active neuron, which is taken back.
    """
    one = shape.itemsize if means else 0
    fixed = router[0] + one * shape.residual
    return FFNCost(
        bytes=UnitCost(
            fixed / shape.bytes,
            1.0 + one * shape.neurons / shape.bytes,
            (low[0] + one) * shape.neurons / shape.bytes,
            closer[0] * shape.neurons / shape.bytes,
        ),
        flops=UnitCost(
            router[1] / shape.flops,
            1.0,
            low[1] * shape.neurons / shape.flops,
            closer[1] * shape.neurons / shape.flops,
        ),
    )
