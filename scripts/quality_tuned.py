"""Tuned copies of the quality benchmark: one by each recipe and one densely, on the same tokens, under every policy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import typer
from quality_rows import Rows

from dynaconv.artifacts.run import Run
from dynaconv.calibrate.solve import solve_budget
from dynaconv.config import RunConfig
from dynaconv.data.windows import Batch
from dynaconv.dynamic.policy import ByThreshold, Full, Policy, Static, Uniform, at_one_threshold
from dynaconv.evaluation.baselines import oracle_routers, recorded_widths, shuffled, static_widths
from dynaconv.evaluation.scoring import Score
from dynaconv.pipeline.runner import run_pipeline
from dynaconv.profile.gated import exact_margin, gated_policy, solve_neurons
from dynaconv.progress import Progress
from dynaconv.recipes import compose

BUDGETS = (0.25, 0.375, 0.5)
NEURON_BUDGETS = (0.1, 0.11, 0.125, 0.15, 0.2, 0.25, 0.35)
Measure = Callable[[Any, Callable[[], Policy | None]], Callable[[], Score]]
DENSE = [  # plain training likes larger steps than a dial's; of 4, 8 and 16 windows at 3e-4, 16 did best
    "finetune.losses.full.weight=1",
    "finetune.losses.distill.weight=0",
    "finetune.losses.distill_full.weight=0",
    "finetune.batch_size=16",
    "finetune.learning_rate=3e-4",
]


@dataclass(frozen=True)
class Copy:
    """A copy to train.

    Attributes:
        weights: The recipe, or ``dense``: plain training of the parent.
        seed: Seeds data order and dial.
    """

    weights: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and its rows."""
        return f"{self.weights}-{self.seed}"

    def config(self, model: Path, text: Path, tokens: int) -> RunConfig:
        """The recipe on ``text``."""
        overrides = [f"finetune.tokens={tokens}", f"seed={self.seed}", "finetune.wandb=off"]
        dense = self.weights == "dense"
        config = compose("nested-uniform" if dense else self.weights, overrides + DENSE * dense)
        config.source, config.data.train = str(model), [str(text)]
        return config


COPIES = (
    Copy("tune", 0),
    Copy("tune", 1),
    Copy("routed", 0),
    Copy("routed", 1),
    Copy("nested", 0),
    Copy("nested-uniform", 0),
    Copy("nested", 1),
    Copy("nested-uniform", 1),
    Copy("nested-difficulty", 0),
    Copy("static-half", 0),
    Copy("dense", 0),
)


def run(config: RunConfig, path: Path, until: str) -> dict[str, Path]:
    """Brings the run in ``path`` to the end of stage ``until``; the folder of each stage."""
    began = time.monotonic()
    opened = Run.open(path) if (path / "manifest.json").is_file() else Run.create(path)
    with Progress() as progress:
        outcomes = run_pipeline(config, opened, until=until, progress=progress)
    typer.echo(f"{path.name}: {time.monotonic() - began:.0f} s")
    return {outcome.name: outcome.folder for outcome in outcomes}


def load_float(folder: Path) -> Any:
    """The converted model in ``folder``, computing in float32 as all that it is compared with."""
    from dynaconv.dynamic.modeling import load

    return load(folder, dtype=torch.float32).eval()


def untrained(table: Rows, copy: Copy, folder: Path, measure: Measure, batches: list[Batch]) -> None:
    """The carved checkpoint before any fine-tuning: closed-form routers against uniform widths."""
    model, name = load_float(folder), f"carved for {copy.weights}"
    for share in BUDGETS:
        table.row(name, "uniform width", share, measure(model, partial(uniform, model, share)))
        table.row(name, "closed-form router", share, measure(model, partial(routed, model, batches, share)))


def score_copy(table: Rows, copy: Copy, folder: Path, measure: Measure, batches: list[Batch]) -> None:
    """Every policy on one trained copy; the oracle on the first seed only."""
    weights, model = copy.weights, load_float(folder)
    if weights == "static-half":
        table.row(weights, "uniform width", 0.5, measure(model, partial(uniform, model, 0.5)))
        return
    table.row(weights, "full dial", 1.0, measure(model, Full))
    if weights == "dense":
        return
    if weights == "tune":
        for budget, policy in sketched(model, batches).items():
            table.row(weights, "sketched", budget, measure(model, policy))
        return
    for share in BUDGETS:
        table.row(weights, "uniform width", share, measure(model, partial(uniform, model, share)))
        if model.layout.router.kind != "none":
            score_routed(table, weights, model, share, measure, batches)
        if weights in ("nested", "nested-uniform") and copy.seed == 0:
            with oracle_routers(model):
                table.row(weights, "label oracle", share, measure(model, partial(routed, model, batches, share)))


def score_routed(table: Rows, weights: str, model: Any, share: float, measure: Measure, batches: list[Batch]) -> None:
    """The routers, and what their widths are worth by layer only, and on random tokens."""
    policy = cache(partial(routed, model, batches, share))
    row = table.row(weights, "routed", share, measure(model, policy))
    if weights == "nested":
        static = Static(static_widths(row["width_by_layer"], model.layout.blocks))
        table.row(weights, "static widths by layer", share, measure(model, lambda: static))
        replay = cache(lambda: shuffled(recorded_widths(model, batches, policy()), seed=0))
        table.row(weights, "same widths, random tokens", share, measure(model, replay))


def sketched(model: Any, batches: list[Batch]) -> dict[float, Callable[[], ByThreshold]]:
    """The sketch routers at the thresholds that spend each of :data:`NEURON_BUDGETS` on ``batches``."""
    table = solve_neurons(model, batches, NEURON_BUDGETS, measure_means=False, tolerance=0.002)
    margin, budgets = exact_margin(model), zip(NEURON_BUDGETS, table.thresholds, strict=False)
    return {budget: partial(gated_policy, model, budget, row[0], margin) for budget, row in budgets}


def uniform(model: Any, share: float) -> Uniform:
    """One width for all tokens and layers; of routed experts, each token's best so many."""
    return Uniform(round(share * model.layout.blocks))


def routed(model: Any, batches: list[Batch], share: float) -> ByThreshold:
    """The routers at the threshold that spends ``share`` of the FFNs on ``batches``."""
    solved = solve_budget(model, batches, share, tolerance=0.002, iterations=10)
    return at_one_threshold(solved.threshold, model.layout.layers)
