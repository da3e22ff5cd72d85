"""Solves and measures the dial over a grid of budgets, the dense parent beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from dynaconv.calibrate.solve import mean_over, run_recorded, solve_budget
from dynaconv.config import CalibrateConfig
from dynaconv.data.windows import Batch
from dynaconv.dynamic.dial import Dial
from dynaconv.dynamic.layout import DialTable, Layout
from dynaconv.dynamic.policy import Full
from dynaconv.dynamic.thresholds import solve_threshold
from dynaconv.evaluation.cost import CostModel
from dynaconv.evaluation.scoring import Score, most_likely, score
from dynaconv.evaluation.speed import decoding, interleaved
from dynaconv.frontier import Frontier, OperatingPoint
from dynaconv.profile.calibration import own_rows
from dynaconv.progress import Task
from dynaconv.ranks import Ranks

SPEED_ROUNDS = 3


@dataclass(frozen=True)
class Text:
    """What thresholds are solved on, and what is scored: both held out of training, and apart from each other."""

    solve: Sequence[Batch]
    score: Sequence[Batch]

    def own(self, ranks: Ranks) -> Text:
        """This rank's windows of every batch.

        Raises:
            ConfigError: There are more ranks than a batch has sequences.
        """
        parts = [own_rows(batches, ranks, what="calibrate.batch_size") for batches in (self.solve, self.score)]
        return Text(*parts)


def thresholds_for(
    model: Any, text: Text, config: CalibrateConfig, task: Task, ranks: Ranks | None = None
) -> DialTable:
    """The dial table of ``model``. The last budget is 1.

    Thresholds are shared by the sites: the routers' own scores say which layer deserves more. With ``ranks``, ``text``
    is this one's.
    """
    budgets, sites = sorted({*config.budgets, 1.0}), len(model.layout.sites)
    found: list[float] = []
    for budget in budgets[:-1]:
        start = found[-1] if found else None
        solved = solve_budget(model, text.solve, budget, tolerance=config.tolerance, start=start, ranks=ranks)
        found.append(min(solved.threshold, found[-1] if found else math.inf))
        task.advance(note=f"budget {budget:g} spends {solved.share:.3f}")
        if abs(solved.share - budget) > max(0.02, config.tolerance):
            task.progress.say(f"calibrate: budget {budget:g} cannot be met; the nearest spends {solved.share:.3f}")
    lowest = _threshold_of_everything(model, text.solve, ranks)
    found.append(min(lowest, found[-1]) if found else lowest)
    return DialTable(tuple(budgets), tuple((threshold,) * sites for threshold in found))


def uniform_table(layout: Layout, budgets: Sequence[float]) -> DialTable:
    """The table of a model without routers: the largest width that each budget pays for."""
    wanted = sorted({*budgets, 1.0})
    widths = [layout.partition.width_within(budget) for budget in wanted]
    return DialTable(tuple(wanted), tuple((float(-width),) * layout.layers for width in widths))


def _threshold_of_everything(model: Any, batches: Sequence[Batch], ranks: Ranks | None) -> float:
    """The highest threshold at which every token of the first batch uses every block."""
    scores = run_recorded(model, batches[:1], Full(scored=True)).all_scores()
    return solve_threshold(model.ffns()[0].router, scores, 1.0, mean=mean_over(ranks, len(scores[0])))


def measure(
    model: Any,
    parent: Any,
    text: Text,
    costs: tuple[CostModel, CostModel],
    speed_tokens: int,
    task: Task,
    ranks: Ranks | None = None,
) -> Frontier:
    """The frontier: the parent, and loss, agreement, share and cost at every budget of the model's table.

    Args:
        model: A dynamic model with its dial table.
        parent: The dense checkpoint it came from.
        text: Scored on ``text.score``.
        costs: Cost models of the parent and of the dynamic model. Routers count except at the full dial, where none
            runs.
        speed_tokens: Tokens generated for tokens/s, 0 for none.
        task: Advanced once a budget.
        ranks: The processes that each have some of ``text``, of which rank 0 measures speed; alone by default.
    """
    dense = score(parent, text.score, ranks=ranks)
    wanted = most_likely(parent, text.score)
    scores: dict[float, Score] = {}
    for budget in model.layout.dial.budgets:
        scores[budget] = score(model, text.score, model.policy(Dial(budget=budget)), parent=wanted, ranks=ranks)
        task.advance(note=f"budget {budget:g} loss {scores[budget].loss:.3f}")
    measured = speed_tokens if ranks is None or ranks.main else 0
    speeds = _speeds(model, parent, text.score[0].input_ids[:1, :16], measured)
    return Frontier(
        parent=_point(1.0, replace(dense, agreement=1.0, widths=()), dense, costs[0], speeds.get("parent")),
        points=tuple(_point(budget, got, dense, costs[1], speeds.get(str(budget))) for budget, got in scores.items()),
        scored_tokens=dense.tokens,
    )


def _point(budget: float, got: Score, dense: Score, cost: CostModel, speed: float | None) -> OperatingPoint:
    cost = cost.without_routers() if Dial(budget=budget).is_full else cost
    return OperatingPoint(
        budget=budget,
        active_share=got.active_share,
        flops_per_token=cost.flops_per_token(got.active_share),
        bytes_per_token=cost.bytes_per_token(got.active_share),
        loss=got.loss,
        quality=math.exp(dense.loss - got.loss),
        agreement=cast(float, got.agreement),
        tokens_per_s=speed,
        width_by_layer=got.widths,
    )


def _speeds(model: Any, parent: Any, prompt: Tensor, tokens: int) -> dict[str, float]:
    """Tokens a second by budget, and of the parent."""
    if not tokens:
        return {}
    runs = {"parent": decoding(parent, prompt, tokens)}
    for budget in model.layout.dial.budgets:
        runs[str(budget)] = decoding(model, prompt, tokens, dial=Dial(budget=budget))
    return {name: tokens / seconds for name, seconds in interleaved(runs, SPEED_ROUNDS).items()}
