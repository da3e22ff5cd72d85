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
        parts = [part.to(self.engine.device) for part in batch.split(self.config.accumulation)]
        for part in parts:
            for name, value in self._micro(part, chosen, len(parts)).items():
                totals[name] = totals.get(name, 0.0) + value / len(parts)
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
        norms = self.engine.step(factor)
        totals |= {f"gradient_norm_{name}": norm for name, norm in norms.items()}
        return totals | {"share_asked": chosen.budget, "rate": factor}

    def _micro(self, batch: Batch, chosen: Draw, parts: int) -> dict[str, float]:
        """Both passes of one micro-batch, gradients accumulated."""
        full_weight = self.config.full_weight / parts
        dial_weight = (1 - self.config.full_weight) / parts
        mask = batch.predicted
        scored: Scored | Full = Scored() if chosen.routed else Full()
        full_logits = self._logits(self.engine.model, batch, scored)
        full_loss = cross_entropy(full_logits, batch.input_ids, mask)
        self.engine.backward(full_weight * full_loss)
        if not dial_weight:  # dense training: what the parent makes of the same tokens
            return {"loss_full": full_loss.item(), "kl_dial": 0.0, "share_spent": 1.0}
        teacher = full_logits.detach() if self.parent is None else self._parent_logits(batch)
        policy = self._policy(chosen, scored)
        with recording() as trace:
            logits = self._logits(self.engine.model, batch, policy)
        divergence = distillation(logits, teacher, mask)
        loss = dial_weight * divergence
        metrics = {"loss_full": full_loss.item(), "kl_dial": divergence.item()}
        if isinstance(policy, Labelled):
            loss = loss + policy.loss() / parts
            metrics["loss_router"] = policy.loss().item()
        self.engine.backward(loss)
        if isinstance(policy, Gated):
            self.engine.backward(policy.centre(self.engine.model.ffns()))
            metrics["score_deviation"] = torch.stack([s.detach().float() for s in policy.scores.values()]).std().item()
        edges = self.engine.model.layout.edges
        metrics["share_spent"] = spent_share({layer: widths[0] for layer, widths in trace.widths.items()}, edges)
        return metrics

    def _policy(self, chosen: Draw, scored: Scored | Full) -> Policy:
        layout = self.engine.model.layout
        if not isinstance(scored, Scored):
            return Uniform(chosen.uniform_width(layout.blocks))
        ask = min(1.0, max(0.01, chosen.budget - self.drift))
        level = solve_level(self.engine.model.ffns()[0].router, list(scored.scores.values()), ask)
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
