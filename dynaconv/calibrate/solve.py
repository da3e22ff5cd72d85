"""Levels that spend a budget, solved while the model is gated.

A dynamic model's hidden states at a low dial are not those of the full dial, so scores measured there ask for another
width. Each iteration therefore runs the model at the level found so far and solves again on the scores of that run.
L layers, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynaconv.data.windows import Batch
from dynaconv.dynamic.context import recording, using
from dynaconv.dynamic.ffn import DynamicFFN
from dynaconv.dynamic.policy import Full, Routed
from dynaconv.dynamic.router import solve_level
from dynaconv.ranks import Ranks


@dataclass(frozen=True)
class Solved:
    """A level and what it spends on the text it was solved on."""

    level: float
    share: float


class Listening:
    """A policy that keeps the router scores of the pass it decides, by layer."""

    def __init__(self, inner: Routed | Full) -> None:
        self.inner = inner
        self.scores: dict[int, list[Tensor]] = {}

    def decide(self, ffn: DynamicFFN, x: Tensor) -> Tensor | None:
        """What the inner policy decides."""
        scores = ffn.router(x)
        self.scores.setdefault(ffn.layer, []).append(scores.flatten(0, x.dim() - 2))
        return self.inner.decide(ffn, x)


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
    """The level, shared by all layers, at which ``model`` spends ``budget`` of its FFNs on ``batches``.

    Args:
        model: A dynamic model with routers.
        batches: Calibration text.
        budget: Active FFN share, in (0, 1).
        tolerance: Largest difference accepted.
        start: Level to begin at, such as that of a neighbouring budget; the full dial's scores when ``None``.
        iterations: Forward passes over ``batches`` at most. The closest level seen is returned.
        ranks: The processes that each have some of the batches; alone by default.
    """
    router, layers = model.ffns()[0].router, model.layout.layers
    ask, best, level = budget, Solved(0.0, float("inf")), start
    for _ in range(iterations + (start is None)):
        policy = Listening(Full() if level is None else Routed(torch.full((layers,), level)))
        share = _spend(model, batches, policy, ranks)
        if level is not None:
            if abs(share - budget) < abs(best.share - budget):
                best = Solved(level, share)
            if abs(share - budget) <= tolerance:
                break
            ask += 0.5 * (budget - share)  # what is left when the scores keep moving with the level
        scores = [torch.cat(policy.scores[layer]) for layer in sorted(policy.scores)]
        level = solve_level(router, scores, min(1.0, max(1e-3, ask)), mean=mean_over(ranks, len(scores[0])))
    return best


def mean_over(ranks: Ranks | None, tokens: int) -> Callable[[Tensor], Tensor]:
    """Takes the mean over ranks of which this one has ``tokens`` tokens."""
    return (lambda one: one) if ranks is None else (lambda one: ranks.mean(one, tokens))


def _spend(model: Any, batches: Sequence[Batch], policy: Listening, ranks: Ranks | None) -> float:
    """Runs ``batches``; returns the share spent on real tokens and keeps only their scores."""
    device = next(model.parameters()).device
    edges = torch.tensor(model.layout.edges, dtype=torch.float64) / model.layout.edges[-1]
    total, count = 0.0, 0
    for batch in batches:
        batch = batch.to(device)
        with recording() as trace, using(policy):
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        used = trace.stacked().cpu()
        if batch.attention_mask is not None:
            real = batch.attention_mask.flatten()
            used = used[:, real.cpu()]
            for scores in policy.scores.values():
                scores[-1] = scores[-1][real]
        total, count = total + float(edges[used].sum()), count + used.numel()
    if ranks is not None:
        total, count = ranks.sum(torch.tensor([total, count], dtype=torch.float64)).tolist()
    return total / count
