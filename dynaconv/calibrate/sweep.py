"""Solves and measures the dial over a grid of budgets, the dense parent beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from dynaconv.profile.gated import solve_neurons
from dynaconv.progress import Task
from dynaconv.ranks import Ranks
from dynaconv.rules import require_affordable

SPEED_ROUNDS = 3
NEURONS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
"""Shares of active neurons whose cost is calibrated where the recipe names no budgets, ..."""
BLOCKS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""... of blocks, ..."""
HIGH = (0.4, 0.55, 0.75)
"""... and budgets above what all neurons cost with low-bit values."""
CLOSER = 1.6
"""Neurons that a sketch looks at twice, for each that is active; about."""


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
    budgets, sites = sorted({*(config.budgets or []), 1.0}), len(model.layout.sites)
    found: list[float] = []
    for budget in budgets[:-1]:
        start = found[-1] if found else None
        solved = solve_budget(model, text.solve, budget, tolerance=config.tolerance, start=start, ranks=ranks)
        found.append(min(solved.threshold, found[-1] if found else math.inf))
        _report(task, config, budget, solved.share)
    lowest = _threshold_of_everything(model, text.solve, ranks)
    found.append(min(lowest, found[-1]) if found else lowest)
    return DialTable(tuple(budgets), tuple((threshold,) * sites for threshold in found))


def neuron_table(
    model: Any, text: Text, config: CalibrateConfig, task: Task, ranks: Ranks | None = None, *, measure_means: bool
) -> DialTable:
    """The dial table of ``model``, whose experts are single neurons; see :func:`solve_neurons`."""
    return solve_neurons(
        model,
        text.solve,
        config.budgets or [],
        measure_means=measure_means,
        tolerance=config.tolerance,
        solved=partial(_report, task, config),
        ranks=ranks,
    )


def _report(task: Task, config: CalibrateConfig, budget: float, spent: float) -> None:
    task.advance(note=f"budget {budget:g} spends {spent:.3f}")
    if abs(spent - budget) > max(0.02, config.tolerance):
        task.progress.say(f"calibrate: budget {budget:g} cannot be met; the nearest spends {spent:.3f}")


def grid(model: Any, config: CalibrateConfig) -> list[float]:
    """The budgets that ``config`` asks for, or some that suit ``model``, in steps of .005.

    Raises:
        ConfigError: A budget is below what the routers read for every token.
    """
    ffn = model.ffns()[0]
    cost, neurons = ffn.cost.bytes, ffn.router.experts == "neurons"
    if config.budgets is None:
        low = neurons and cost.low > 0
        costs = [cost.of(a, 0.0 if low else a, min(1.0, CLOSER * a)) for a in (NEURONS if neurons else BLOCKS)]
        costs += [budget for budget in HIGH if low and budget > costs[-1] + 0.05]
        return sorted({round(200 * one) / 200 for one in costs if cost.fixed + 0.005 < one < 0.99})
    asked = [budget for budget in config.budgets if budget < 1]
    require_affordable("calibrate.budgets", asked, cost.fixed)
    return asked


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
    """The frontier: the parent, and loss, agreement and costs at every budget of the model's table.

    Args:
        model: A dynamic model with its dial table.
        parent: The dense checkpoint it came from.
        text: Scored on ``text.score``.
        costs: Cost models of the parent, and of the dense checkpoint that ``model`` is at full dial.
        speed_tokens: Tokens generated for tokens/s, 0 for none.
        task: Advanced once a budget.
        ranks: The processes that each have some of ``text``, of which rank 0 measures speed; alone by default.
    """
    dense = score(parent, text.score, ranks=ranks)
    prompted = score(parent, text.score, ranks=ranks, prompted=True).loss
    wanted = most_likely(parent, text.score)
    found: list[tuple[float, Score, float]] = []
    for budget in model.layout.dial.budgets:
        policy = model.policy(Dial(budget=budget))
        got = score(model, text.score, policy, parent=wanted, ranks=ranks)
        after = score(model, text.score, policy, ranks=ranks, prompted=True).loss
        found.append((budget, got, after))
        task.advance(note=f"budget {budget:g} loss {got.loss:.3f}")
    measured = speed_tokens if ranks is None or ranks.main else 0
    speeds = _speeds(model, parent, text.score[0].input_ids[:1, :16], measured)
    of_parent = _point(1.0, replace(dense, agreement=1.0, widths=()), prompted, dense, prompted, costs[0])
    points = [_point(budget, got, after, dense, prompted, costs[1]) for budget, got, after in found]
    return Frontier(
        parent=replace(of_parent, tokens_per_s=speeds.get("parent")),
        points=tuple(replace(point, tokens_per_s=speeds.get(str(point.budget))) for point in points),
        scored_tokens=dense.tokens,
        router_bytes_share=model.ffns()[0].cost.bytes.fixed,
    )


def _point(
    budget: float, got: Score, after_prompt: float, dense: Score, dense_after_prompt: float, cost: CostModel
) -> OperatingPoint:
    return OperatingPoint(
        budget=budget,
        bytes_share=got.bytes_share,
        flops_share=got.flops_share,
        active_share=got.active_share,
        exact_share=got.exact_share,
        flops_per_token=cost.flops_per_token(got.flops_share),
        bytes_per_token=cost.bytes_per_token(got.bytes_share),
        loss=got.loss,
        quality=math.exp(dense.loss - got.loss),
        agreement=cast(float, got.agreement),
        prompted_loss=after_prompt,
        prompted_quality=math.exp(dense_after_prompt - after_prompt),
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
