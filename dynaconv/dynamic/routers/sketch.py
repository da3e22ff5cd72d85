"""Router kind ``sketch``: what each neuron would give, read off a few-bit copy of the weights themselves.

A neuron is on where ``log(|act(gate^ x) (up^ x)| * ||down column||)`` is above the threshold, with gate^ and up^ the
first bit planes of the copy (or, where FFNs have no gate, act(up^ x) alone). Nothing is trained: scores follow the
weights. Scores of a layer are taken relative to its ``offset``, since contributions of layers do not compare.

It may look twice: in few planes at all neurons, and in more at those that come within ``reach`` of the threshold, so
that most bytes go to neurons that are about to be used. Ships with every exported model.

D residual width, F neurons.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from dynaconv.dynamic.few_bits import FewBitCopy
from dynaconv.dynamic.layout import RouterLayout
from dynaconv.dynamic.routers.base import Router, as_threshold, top_mask
from dynaconv.kernels.choice import Choice, Subset
from dynaconv.kernels.partition import Partition
from dynaconv.kernels.weights import FFNWeights

SMALLEST = 1e-30
"""Contributions below this count as this: a score is never minus infinity."""


class SketchRouter(Router):
    """F scores a token, in nats."""

    kind = "sketch"
    experts = "neurons"
    objective = "weights"
    exportable = "no other engine leaves out single neurons"

    offset: Tensor
    copy: FewBitCopy

    def __init__(self, hidden_size: int, partition: Partition, layout: RouterLayout) -> None:
        super().__init__(hidden_size, partition, RouterLayout(layout.kind))
        self.reach = layout.reach
        self.register_buffer("offset", torch.zeros(()))
        self._weights: FFNWeights | None = None

    def follow(self, copy: FewBitCopy, weights: FFNWeights) -> None:
        """Scores from here on are those of ``weights``, through their ``copy``, which has been made."""
        self.copy, self._weights = copy, weights

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_weights": None}

    def forward(self, x: Tensor) -> Tensor:
        """Scores of tokens ``x`` (..., D), float32, without gradient: (..., F), or (..., 2 F) where it looks twice.

        Then the first F are what :meth:`choose` compares: what the second look gives, held down to ``reach`` above what
        the first gives. The other F are what decides whether there is a second look: the first plus ``reach``.
        """
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            first, *second = (self._given(x, *sketch) for sketch in self.copy.sketches)
            if not second:
                return first
            first = first + self.reach
            return torch.cat([torch.minimum(second[0], first), first], dim=-1)

    def _given(self, x: Tensor, gate: Tensor | None, up: Tensor) -> Tensor:
        """What each neuron would give by matrices ``gate`` and ``up``, (..., F) in nats, relative to the offset."""
        weights = self._weights
        assert weights is not None, "the FFN hands over its weights before it asks for scores"
        x = x.to(up.dtype)
        given = linear(x, up, weights.up_bias)
        if gate is None:
            given = weights.activation(given)
        else:
            given = weights.activation(linear(x, gate, weights.gate_bias)) * given
        return (given.float().abs() * self.copy.norms).clamp_min(SMALLEST).log() - self.offset

    def choose(self, scores: Tensor, threshold: Tensor | float) -> Choice:
        """See :meth:`Router.choose`."""
        compared, closer = self.parts(scores)
        threshold = as_threshold(threshold, scores)[..., None]
        return Subset(compared > threshold, closer=None if closer is None else closer > threshold)

    def parts(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """The two halves of ``scores`` (see :meth:`forward`), (..., F) each; no second one where it looks once."""
        if scores.shape[-1] == self.blocks:
            return scores, None
        compared, closer = scores.chunk(2, dim=-1)
        return compared, closer

    def top(self, x: Tensor, width: int) -> Choice:
        """See :meth:`Router.top`. All neurons are looked at twice."""
        compared, closer = self.parts(self(x))
        chosen = top_mask(compared, width)
        return chosen if closer is None else replace(chosen, closer=torch.ones_like(chosen.on))

    def threshold_range(self) -> tuple[float, float]:
        """See :meth:`Router.threshold_range`."""
        return 2 * math.log(SMALLEST), -2 * math.log(SMALLEST)
