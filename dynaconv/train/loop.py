"""The fine-tuning loop: one readable step, run from wherever the last saved state left off.

A step runs the full dial (cross-entropy) and the sampled dial (distilled from the full dial, or from the frozen
parent), and steps once. Router targets are in :mod:`dynaconv.train.routing`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dynaconv.config import FinetuneConfig
from dynaconv.data.windows import Batch, Windows, training_batch
from dynaconv.dynamic.context import recording, using
from dynaconv.dynamic.policy import Full, Policy, Uniform
from dynaconv.dynamic.router import solve_level
from dynaconv.errors import QualityError
from dynaconv.train.engine import Engine
from dynaconv.train.losses import cross_entropy, distillation
from dynaconv.train.routing import Gated, Labelled, Scored, spent_share
from dynaconv.train.sampler import Draw, draw, rate

DRIFT_GAIN = 0.2  # how much of the last step's difference between share spent and share asked is carried over


@dataclass(frozen=True)
class Micro:
    """This rank's share of one micro-batch. Gradients and metrics are averaged over ranks.

    Attributes:
        batch: The windows.
        tokens: Weight of means over its scored tokens: their share of the step's, times the number of ranks.
        rows: Weight of means over its windows: one over the number of micro-batches.
        last: Whether the step's backward passes end with it.
    """

    batch: Batch
    tokens: float
    rows: float
    last: bool


@dataclass
class Trainer:
    """One fine-tuning run.

    Attributes:
        engine: Model and optimiser.
        config: The recipe's ``finetune`` section.
        windows: Training text.
        steps: Optimiser steps in all.
        seed: Of the data order and the dial.
        parent: The frozen dense model where it is the teacher.
        drift: Share spent minus share asked, running; the share controller's state.
    """

    engine: Engine
    config: FinetuneConfig
    windows: Windows
    steps: int
    seed: int
    parent: Any = None
    drift: float = field(default=0.0)

    def run(self, start: int, finished: Callable[[int, dict[str, float]], None]) -> None:
        """Steps ``start`` to the end; calls ``finished(step, metrics)`` after each.

        Raises:
            QualityError: The loss stopped being a number.
        """
        self.engine.model.train()
        for step in range(start, self.steps):
            finished(step, self.step(step))

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns its metrics."""
        chosen = draw(self.config, self.seed, step, self.steps)
        batch = training_batch(self.windows, step, self.config.batch_size, self.seed)
        totals: dict[str, float] = {}
        for micro in self._shares(batch):
            for name, value in self._micro(micro, chosen).items():
                totals[name] = totals.get(name, 0.0) + value
        means = self.engine.ranks.mean(torch.tensor([*totals.values()], dtype=torch.float64))
        totals = dict(zip(totals, means.tolist(), strict=True))
        bad = [name for name, value in totals.items() if value != value or abs(value) == float("inf")]
        if bad:
            raise QualityError(
                f"{bad[0]} is no longer a number",
                where=f"finetune, step {step + 1} of {self.steps}",
                hint="lower finetune.learning_rate or raise finetune.warmup_steps; the last saved state is kept",
            )
        if chosen.routed:
            self.drift += DRIFT_GAIN * (totals["share_spent"] - chosen.budget)
        factor = rate(step, self.steps, self.config.warmup_steps)
        totals |= self.engine.step(factor)
        return totals | {"share_asked": chosen.budget, "rate": factor}

    def _shares(self, batch: Batch) -> list[Micro]:
        """The step's micro-batches, of each the windows of this rank: the same in all for any number of ranks."""
        ranks, scored = self.engine.ranks, max(1, int(batch.predicted.sum()))
        parts = [part.rows(*ranks.rows(len(part.input_ids))) for part in batch.split(self.config.accumulation)]
        return [
            Micro(
                batch=part.to(self.engine.device),
                tokens=ranks.world * int(part.predicted.sum()) / scored,
                rows=1 / len(parts),
                last=place == len(parts),
            )
            for place, part in enumerate(parts, 1)
        ]

    def _micro(self, micro: Micro, chosen: Draw) -> dict[str, float]:
        """Both passes of one micro-batch, gradients accumulated; its metrics, weighted."""
        engine, batch = self.engine, micro.batch
        full_weight, dial_weight = self.config.full_weight, 1 - self.config.full_weight
        mask = batch.predicted
        scored: Scored | Full = Scored() if chosen.routed else Full()
        full_logits = self._logits(engine.model, batch, scored)
        full_loss = cross_entropy(full_logits, batch.input_ids, mask) * micro.tokens
        engine.backward(full_weight * full_loss, last=micro.last and not dial_weight)
        if not dial_weight:  # dense training: what the parent makes of the same tokens
            return {"loss_full": full_loss.item(), "kl_dial": 0.0, "share_spent": micro.rows}
        teacher = full_logits.detach() if self.parent is None else self._parent_logits(batch)
        policy = self._policy(chosen, scored)
        with recording() as trace:
            logits = self._logits(engine.model, batch, policy)
        divergence = distillation(logits, teacher, mask) * micro.tokens
        loss = dial_weight * divergence
        metrics = {"loss_full": full_loss.item(), "kl_dial": divergence.item()}
        if isinstance(policy, Labelled):
            loss = loss + policy.loss() * micro.rows
            metrics["loss_router"] = policy.loss().item() * micro.rows
        engine.backward(loss, last=micro.last and not isinstance(policy, Gated))
        if isinstance(policy, Gated):
            engine.backward(policy.centre(engine.network.ffns(), engine.ranks.mean), last=micro.last)
            deviation = torch.stack([s.detach().float() for s in policy.scores.values()]).std().item()
            metrics["score_deviation"] = deviation * micro.rows
        edges = engine.network.layout.edges
        spent = spent_share({layer: widths[0] for layer, widths in trace.widths.items()}, edges)
        return metrics | {"share_spent": spent * micro.rows}

    def _policy(self, chosen: Draw, scored: Scored | Full) -> Policy:
        layout = self.engine.network.layout
        if not isinstance(scored, Scored):
            return Uniform(chosen.uniform_width(layout.blocks))
        ask = min(1.0, max(0.01, chosen.budget - self.drift))
        router, mean = self.engine.network.ffns()[0].router, self.engine.ranks.mean
        level = solve_level(router, list(scored.scores.values()), ask, mean=mean)
        if self.config.router == "gate":
            return Gated(level, self.config.temperature)
        return Labelled(level, self.config.theta)

    def _logits(self, model: Any, batch: Batch, policy: Policy) -> Tensor:
        with using(policy), self.engine.autocast():
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        assert isinstance(logits, Tensor)
        return logits

    def _parent_logits(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self._logits(self.parent, batch, Full())
