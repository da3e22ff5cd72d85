"""Thresholds that spend a budget, solved while the model is gated.

A dynamic model's hidden states at a low dial are not those of the full dial, so scores measured there ask for another
share. Each iteration therefore runs the model at the threshold found so far and solves again on the scores of that run.
L sites, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynaconv.data.windows import Batch
from dynaconv.dynamic.policy import Full, Policy, at_one_threshold
from dynaconv.dynamic.recorder import Record, Recorder
from dynaconv.dynamic.thresholds import solve_threshold
from dynaconv.ranks import Ranks

KEPT_SCORES = 2**24
"""Scores kept at once to solve on. Where tokens times blocks times layers are more, one token in so many is kept:
millions of scores are enough to solve on, and what a threshold spends is then measured on all tokens."""


@dataclass(frozen=True)
class Solved:
    """A threshold, and the share of the parent's FFN bytes that it spends on the text it was solved on."""

    threshold: float
    share: float


class ScoreRecorder(Recorder):
    """Keeps scores, and the sum of what is spent, of tokens that are not padding.

    Attributes:
        every: One token of so many has its scores kept.
        attention_mask: Of the batch under way, (B, T) bool, or ``None``.
        spent: Sum over tokens and sites of the share of the parent's FFN bytes that is read.
        count: Of how many.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every, self.spent, self.count = every, 0.0, 0
        self.attention_mask: Tensor | None = None

    def record(self, record: Record) -> None:
        """See :meth:`Recorder.record`."""
        shares, scores = record.bytes_share().flatten(), record.scores
        assert scores is not None
        rows = scores.detach().flatten(0, record.x.dim() - 2)
        if self.attention_mask is not None:
            real = self.attention_mask.flatten()
            shares, rows = shares[real], rows[real]
        self.spent += float(shares.sum())
        self.count += len(shares)
        self.scores.setdefault(record.site.index, []).append(rows[:: self.every].clone())

    def all_scores(self) -> list[Tensor]:
        """The scores kept of each site, (tokens,) or (tokens, n)."""
        return [torch.cat(self.scores[index]) for index in sorted(self.scores)]


@torch.no_grad()
def solve_budget(
    model: Any,
    batches: Sequence[Batch],
    budget: float,
    *,
    tolerance: float = 0.005,
    start: float | None = None,
    iterations: int = 8,
    ranks: Ranks | None = None,
) -> Solved:
    """The threshold, shared by all sites, at which ``model`` spends ``budget`` on ``batches``.

    Args:
        model: A dynamic model with routers.
        batches: Calibration text.
        budget: Share of the parent's FFN bytes, in (0, 1).
        tolerance: Largest difference accepted.
        start: Threshold to begin at, such as that of a neighbouring budget; the full dial's scores when ``None``.
        iterations: Forward passes over ``batches`` at most. The closest threshold seen is returned.
        ranks: The processes that each have some of the batches; alone by default.
    """
    router, cost, sites = model.ffns()[0].router, model.ffns()[0].cost.bytes, len(model.layout.sites)
    ask, best, threshold = budget, Solved(math.inf, math.inf), start
    for _ in range(iterations + (start is None)):
        policy = Full(scored=True) if threshold is None else at_one_threshold(threshold, sites)
        found = run_recorded(model, batches, policy)
        share = _spent_share(found, ranks)
        if threshold is not None:
            if abs(share - budget) < abs(best.share - budget):
                best = Solved(threshold, share)
            if abs(share - budget) <= tolerance:
                break
            ask += 0.5 * (budget - share)  # what is left when the scores keep moving with the threshold
        scores = found.all_scores()
        asked = min(1.0, max(1e-3, ask))
        threshold = solve_threshold(router, scores, asked, cost, mean=mean_over(ranks, len(scores[0])))
    return best


def mean_over(ranks: Ranks | None, tokens: int) -> Callable[[Tensor], Tensor]:
    """Takes the mean over ranks of which this one has ``tokens`` tokens."""
    return (lambda one: one) if ranks is None else (lambda one: ranks.mean(one, tokens))


@torch.no_grad()
def run_recorded(model: Any, batches: Sequence[Batch], policy: Policy) -> ScoreRecorder:
    """Runs ``batches`` under ``policy``, which looks at scores; what was spent, and the scores of its tokens."""
    device, router = next(model.parameters()).device, model.ffns()[0].router
    scores = sum(batch.tokens for batch in batches) * len(model.layout.sites)
    recorder = ScoreRecorder(every=math.ceil(scores * (router.blocks if router.features else 1) / KEPT_SCORES))
    for batch in batches:
        batch = batch.to(device)
        recorder.attention_mask = batch.attention_mask
        with model.call.using(policy, recorder):
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return recorder


def _spent_share(found: ScoreRecorder, ranks: Ranks | None) -> float:
    """Mean cost over tokens that are not padding and sites, of all ranks."""
    sums = torch.tensor([found.spent, found.count], dtype=torch.float64)
    spent, count = (sums if ranks is None else ranks.sum(sums)).tolist()
    return spent / count
