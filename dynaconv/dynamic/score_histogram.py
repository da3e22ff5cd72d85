"""How a layer's scores are distributed, in a few thousand counts: all that is needed to solve a threshold.

A site with thousands of neurons has as many scores a token; keeping them would take gigabytes, counting them takes
kilobytes whatever the text. Counts add up over batches and processes. Ships with every exported model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dynaconv.dynamic.cost import UnitCost

LOWEST, HIGHEST = -32.0, 32.0
"""Nats; scores outside are counted at these ends."""
BINS = 4096
WIDTH = (HIGHEST - LOWEST) / BINS


class ScoreHistogram:
    """Counts of scores.

    Attributes:
        counts: (BINS,) int64.
    """

    def __init__(self, counts: Tensor | None = None) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64) if counts is None else counts

    def add(self, scores: Tensor) -> None:
        """Counts ``scores``, of any shape.

        Raises:
            ValueError: There is NaN among them.
        """
        places = ((scores.detach().flatten() - LOWEST) * (1 / WIDTH)).clamp(0, BINS - 1)
        if bool(torch.isnan(places.sum())):
            raise ValueError("a router gave NaN as a score")
        self.counts += torch.bincount(places.int(), minlength=BINS).cpu()

    def above(self, threshold: float) -> float:
        """Share of the scores above ``threshold``; within a bin they are taken to be spread evenly."""
        total = int(self.counts.sum())
        place = (threshold - LOWEST) / WIDTH
        if place >= BINS or not total:
            return 0.0
        if place <= 0:
            return 1.0
        first = int(place)
        inside = (first + 1 - place) * int(self.counts[first])
        return (inside + int(self.counts[first + 1 :].sum())) / total

    def quantile(self, share: float) -> float:
        """The threshold above which ``share`` of the scores lie."""
        return _bisect(lambda threshold: self.above(threshold) >= share)


class NeuronScores:
    """How the scores of single neurons are distributed: what is compared, and what decides on a second look.

    Attributes:
        compared: See :meth:`SketchRouter.parts`.
        closer: Likewise.
    """

    def __init__(self) -> None:
        self.compared, self.closer = ScoreHistogram(), ScoreHistogram()

    def add(self, compared: Tensor, closer: Tensor) -> None:
        """Counts scores."""
        self.compared.add(compared)
        self.closer.add(closer)

    def threshold(self, budget: float, cost: UnitCost, margin: float = 0.0) -> float:
        """The threshold that spends ``budget``, as far as it can be spent.

        Args:
            budget: Mean cost of a token, in the unit of ``cost``.
            cost: What neurons cost.
            margin: How far above it scores have exact values; 0 where all active neurons do.
        """
        return _bisect(lambda threshold: self.spent(threshold, cost, margin) >= budget)

    def spent(self, threshold: float, cost: UnitCost, margin: float = 0.0) -> float:
        """Mean cost of a token at ``threshold``, with exact values ``margin`` above it."""
        active, closer = self.compared.above(threshold), self.closer.above(threshold)
        return cost.of(active, self.compared.above(threshold + margin) if margin else active, closer)


def _bisect(reached: Callable[[float], bool]) -> float:
    """The highest value for which ``reached`` holds, of a condition that fails from some value on."""
    low, high = LOWEST, HIGHEST
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) else (low, middle)
    return (low + high) / 2
