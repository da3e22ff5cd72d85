"""Router kind ``sketch``: what each neuron would give, read off a few-bit copy of the weights themselves.

A neuron gives ``|act(gate x) (up x)| * ||down column||`` (``|act(up x)| * ||down column||`` where FFNs have no gate).
The router looks twice. First at the gate alone, in the fewest bits, for all neurons; ``up x`` is taken to have its mean
size for an input of that norm (``up_mean``, from calibration text). Then at gate and up, in a few more bits, for the
neurons that come within ``reach`` of being used by the first look, so that most bytes go to neurons about to be
used. A neuron is on where both looks say so. Where the activation is flat below 0 (ReLU), neurons that a look puts
there are told apart by how likely it is that only rounding has put them there: see :func:`blurred`. Nothing is trained:
scores follow the weights. They are relative to the layer's ``offset``, since what layers add does not compare. Ships
with every exported model.

D residual width, F neurons.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from dynaconv.dynamic.few_bits import FewBitCopy, computed_dtype, norms
from dynaconv.dynamic.layout import RouterLayout
from dynaconv.dynamic.routers.base import Router, as_threshold, top_mask
from dynaconv.kernels.choice import Choice, Subset
from dynaconv.kernels.partition import Partition
from dynaconv.kernels.sketched import SMALLEST, SketchedFFN
from dynaconv.kernels.weights import FFNWeights


class SketchRouter(Router):
    """F scores of each look, in nats."""

    kind = "sketch"
    experts = "neurons"
    objective = "weights"
    exportable = "no other engine leaves out single neurons"

    offset: Tensor
    up_mean: Tensor
    copy: FewBitCopy

    def __init__(self, hidden_size: int, partition: Partition, layout: RouterLayout) -> None:
        super().__init__(hidden_size, partition, RouterLayout(layout.kind))
        self.reach = layout.reach
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("up_mean", torch.ones(partition.neurons))
        self._weights: FFNWeights | None = None

    def follow(self, copy: FewBitCopy, weights: FFNWeights) -> None:
        """Scores from here on are those of ``weights``, through their ``copy``, which has been made."""
        self.copy, self._weights = copy, weights

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_weights": None}

    def forward(self, x: Tensor) -> Tensor:
        """Scores (..., 2 F) float32 of tokens ``x`` (..., D), without gradient; :meth:`parts` says what they are."""
        weights, copy = self._weights, self.copy
        assert weights is not None, "the FFN hands over its weights before it asks for scores"
        dtype = computed_dtype(weights.up)
        with torch.no_grad(), torch.autocast(x.device.type, dtype, enabled=dtype != weights.up.dtype):
            x, (gate, up), sizes = x.to(dtype), copy.second(dtype), copy.norms
            length, bias = norms(x, dim=-1, keepdim=True), weights.up_bias if gate is None else weights.gate_bias
            seen = [linear(x, matrix, bias) for matrix in (copy.first(dtype), up if gate is None else gate)]
            if copy.rounding is not None:
                seen = [blurred(one, error * length) for one, error in zip(seen, copy.rounding, strict=True)]
            first, second = map(weights.activation, seen)
            if gate is not None:
                second = second * linear(x, up, weights.up_bias)
                sizes = sizes * self.up_mean * length
            looked = self._score(first, sizes) + self.reach
            return torch.cat([torch.minimum(self._score(second, copy.norms), looked), looked], dim=-1)

    def _score(self, given: Tensor, size: Tensor) -> Tensor:
        return (given.float().abs() * size).clamp_min(SMALLEST).log() - self.offset

    def sketched(self, weights: FFNWeights, activation: str) -> SketchedFFN:
        """What fused kernels need of ``weights``, whose copy has been made, and of this router."""
        gate, up, down = self.copy.codes
        looked = self.copy.norms if gate is None else self.copy.norms * self.up_mean
        bits, coarse = self.copy.bits, self.copy.coarse
        return SketchedFFN(
            weights, gate, up, down, self.copy.norms, looked, self.reach, coarse, bits, activation, self.copy.rounding
        )

    def level(self, threshold: Tensor) -> Tensor:
        """The size of a neuron whose score is ``threshold`` (...), float32."""
        return (threshold.float() + self.offset).exp()

    def parts(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """What is compared with the threshold, and what decides on a second look, (..., F) each.

        The second is the score of the first look plus ``reach``; the first is the lower one of that and of the score of
        the second look: whatever the threshold, it is passed by those that both looks pass.
        """
        compared, looked = scores.chunk(2, dim=-1)
        return compared, looked

    def choose(self, scores: Tensor, threshold: Tensor | float) -> Choice:
        """See :meth:`Router.choose`."""
        (compared, looked), threshold = self.parts(scores), as_threshold(threshold, scores)[..., None]
        return Subset(compared > threshold, closer=looked > threshold)

    def top(self, x: Tensor, width: int) -> Choice:
        """See :meth:`Router.top`. All neurons are looked at twice."""
        chosen = top_mask(self.parts(self(x))[0], width)
        return replace(chosen, closer=torch.ones_like(chosen.on))

    def threshold_range(self) -> tuple[float, float]:
        """See :meth:`Router.threshold_range`."""
        return 2 * math.log(SMALLEST), -2 * math.log(SMALLEST)


def blurred(seen: Tensor, width: Tensor) -> Tensor:
    """``(seen + sqrt(seen**2 + width**2)) / 2``, float32: what is above 0 of ``seen`` (..., F), give or take ``width``.

    What ReLU gives on average where ``seen`` has an error of that size: far above 0 it is ``seen``, at 0 half of
    ``width``, and below it falls slowly, so that any share of the neurons can be asked for.

    Args:
        seen: What an activation is about to see that gives nothing below 0.
        width: (..., 1) float32.
    """
    seen, square = seen.float(), width.square()
    below = square / (seen.abs() + (seen.square() + square).sqrt()).clamp_min(SMALLEST)  # nothing cancels this way
    return seen.clamp_min(0) + below / 2
