"""The fine-tuning loop: one readable step, run from wherever the last saved state left off.

A step draws its dial, takes its batch, runs the passes (:mod:`dynaconv.train.passes`), looks at what came out before
anything is changed by it, and steps once. Draw, batch and weights of losses are pure functions of seed and step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dynaconv.config import FinetuneConfig
from dynaconv.data.windows import Batch, Windows, training_batch
from dynaconv.train.engine import Engine
from dynaconv.train.passes import Micro, Passes, Plan
from dynaconv.train.sampler import rate
from dynaconv.train.watch import Watch

DRIFT_GAIN = 0.2  # how much of the last step's difference between share spent and share asked is carried over


@dataclass
class Trainer:
    """One fine-tuning run.

    Attributes:
        engine: Model and optimiser.
        config: The recipe's ``finetune`` section.
        windows: Training text.
        steps: Optimiser steps in all.
        seed: Of the data order and the dial.
        parent: The frozen dense model where it teaches.
        drift: Share spent minus share asked, running; the share controller's state.
        watch: Stops a run whose loss explodes.
    """

    engine: Engine
    config: FinetuneConfig
    windows: Windows
    steps: int
    seed: int
    parent: Any = None
    drift: float = 0.0
    watch: Watch = field(default_factory=Watch)

    def run(self, start: int, finished: Callable[[int, dict[str, float]], None]) -> None:
        """Steps ``start`` to the end; calls ``finished(step, metrics)`` after each.

        Raises:
            QualityError: The loss exploded or stopped being a number.
        """
        self.engine.model.train()
        for step in range(start, self.steps):
            finished(step, self.step(step))

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns its metrics."""
        config = self.config
        plan = Plan.of(config, self.seed, step, self.steps, self.drift)
        batch = training_batch(self.windows, step, config.batch_size, self.seed)
        passes, totals = Passes(self.engine, config, self.parent), dict[str, float]()
        for micro in self._shares(batch):
            for name, value in passes.run(micro, plan).items():
                totals[name] = totals.get(name, 0.0) + value
        means = self.engine.ranks.mean(torch.tensor([*totals.values()], dtype=torch.float64))
        totals = dict(zip(totals, means.tolist(), strict=True))
        self._check(step, totals)
        if plan.routed:
            self.drift += DRIFT_GAIN * (totals["share_spent"] - plan.drawn.budget)
        factor = rate(step, self.steps, config.warmup_steps)
        totals |= self.engine.step(factor)
        return totals | {"share_asked": plan.drawn.budget if plan.at_dial else 1.0, "rate": factor}

    def _check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Stops before the gradients of a loss that exploded are used."""
        first = step * self.config.batch_size
        last = first + self.config.batch_size - 1
        batch = f"windows {first} to {last} of the training order that seed {self.seed} draws"
        self.watch.check(metrics, where=f"finetune, step {step + 1} of {self.steps}", batch=batch)

    def _shares(self, batch: Batch) -> list[Micro]:
        """The step's micro-batches, of each the windows of this rank: the same in all for any number of ranks."""
        ranks, real, scored = self.engine.ranks, batch.tokens, max(1, int(batch.predicted.sum()))
        parts = [part.rows(*ranks.rows(len(part.input_ids))) for part in batch.split(self.config.accumulation)]
        return [
            Micro(
                batch=part.to(self.engine.device),
                scored=ranks.world * int(part.predicted.sum()) / scored,
                real=ranks.world * part.tokens / real,
                last=place == len(parts),
            )
            for place, part in enumerate(parts, 1)
        ]
