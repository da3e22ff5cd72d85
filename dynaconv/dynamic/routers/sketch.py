"""Router kind ``sketch``: what each neuron would give, read off a few-bit copy of the weights themselves.

A neuron is on where ``log(|act(gate^ x) (up^ x)| * ||down column||)`` is above the threshold, with gate^ and up^ the
first bit planes of the copy (or, where FFNs have no gate, act(up^ x) alone). Nothing is trained: scores follow the
weights. Scores of a layer are taken relative to its ``offset``, since contributions of layers do not compare. Ships
with every exported model.

D residual width, F neurons.
"""

from __future__ import annotations

import math

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
    exportable = "no other engine leaves out single neurons"

    offset: Tensor
    copy: FewBitCopy

    def __init__(self, hidden_size: int, partition: Partition, layout: RouterLayout) -> None:
        super().__init__(hidden_size, partition, RouterLayout(layout.kind))
        self.register_buffer("offset", torch.zeros(()))
        self._weights: FFNWeights | None = None

    def follow(self, copy: FewBitCopy, weights: FFNWeights) -> None:
        """Scores from here on are those of ``weights``, through their ``copy``."""
        if not torch.compiler.is_compiling():  # compiled code uses the copy that was made before
            copy.follow(weights)
        self.copy, self._weights = copy, weights

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_weights": None}

    def forward(self, x: Tensor) -> Tensor:
        """Scores (..., F) float32 of tokens ``x`` (..., D); no gradient."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            weights = self._weights
            assert weights is not None, "the FFN hands over its weights before it asks for scores"
            gate, up = self.copy.sketch
            x = x.to(up.dtype)
            given = linear(x, up, weights.up_bias)
            if gate is None:
                given = weights.activation(given)
            else:
                given = weights.activation(linear(x, gate, weights.gate_bias)) * given
            return (given.float().abs() * self.copy.norms).clamp_min(SMALLEST).log() - self.offset

    def choose(self, scores: Tensor, threshold: Tensor | float) -> Choice:
        """See :meth:`Router.choose`."""
        return Subset(scores > as_threshold(threshold, scores)[..., None])

    def top(self, x: Tensor, width: int) -> Choice:
        """See :meth:`Router.top`."""
        return top_mask(self(x), width)

    def threshold_range(self) -> tuple[float, float]:
        """See :meth:`Router.threshold_range`."""
        return 2 * math.log(SMALLEST), -2 * math.log(SMALLEST)
