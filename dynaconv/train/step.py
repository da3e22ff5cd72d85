"""Fine-tuning on one page: draw the dial, run the passes, sum the losses, go backward, correct the budget, step.

What a step runs follows from what its objectives need (:class:`StepPlan`): for each micro-batch at most a pass of the
frozen parent, one at the full dial, one at a second dial and one at the sampled dial, in this order. The full dial goes
backward before the sampled dial runs, so that only one of them keeps its activations at a time. By default a step costs
three forward passes, one of them of the parent, and two backward passes: 7/3 of dense training.

M scored tokens of a micro-batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dynaconv.config import FinetuneConfig
from dynaconv.data.windows import Batch, Windows, training_batch
from dynaconv.dynamic.policy import Full, Policy, Uniform, at_one_threshold
from dynaconv.dynamic.recorder import Recorder
from dynaconv.dynamic.routers.sketch import SketchRouter
from dynaconv.dynamic.thresholds import solve_threshold
from dynaconv.profile.gated import NeuronRecorder, gated_policy
from dynaconv.train.budget_controller import BudgetController
from dynaconv.train.engine import Engine
from dynaconv.train.micro_batch import MicroBatch, micro_batches
from dynaconv.train.objectives.base import Outcome, Pass, log_probabilities
from dynaconv.train.objectives.router_targets import TARGETS, LabelRecorder
from dynaconv.train.optimizer import learning_rate_factor
from dynaconv.train.sampler import uniform_width
from dynaconv.train.statistics import micro_batch_statistics, score_std, share_spent
from dynaconv.train.step_plan import StepPlan
from dynaconv.train.straight_through import ScoreGradients, StraightThrough
from dynaconv.train.tokens import real_tokens
from dynaconv.train.watch import Watch


@dataclass
class Trainer:
    """One fine-tuning run.

    Attributes:
        engine: Model and optimizer.
        config: The recipe's ``finetune`` section.
        windows: Training text.
        steps: Optimizer steps in all.
        seed: Of the data order and the dial.
        parent: The frozen dense model where it teaches.
        controller: Keeps the share spent at the share asked for.
        watch: Stops a run whose loss explodes.
        exact_margin: Of single neurons: how far above the threshold values are exact, in nats; 0 where all are.
    """

    engine: Engine
    config: FinetuneConfig
    windows: Windows
    steps: int
    seed: int
    parent: Any = None
    controller: BudgetController = field(default_factory=BudgetController)
    watch: Watch = field(default_factory=Watch)
    exact_margin: float = 0.0

    def run(self, start: int, finished: Callable[[int, dict[str, float]], None]) -> None:
        """Steps ``start`` to the end; calls ``finished(step, metrics)`` after each.

        Raises:
            QualityError: The loss exploded or stopped being a number.
        """
        self.engine.model.train()
        for step in range(start, self.steps):
            finished(step, self.step(step))

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step; returns its metrics."""
        config, engine = self.config, self.engine
        plan = StepPlan.of(config, self.seed, step, self.steps)
        batch = training_batch(self.windows, step, config.batch_size, self.seed)
        metrics = dict[str, float]()
        for micro in micro_batches(batch, config.accumulation, engine.ranks, engine.device):
            for name, value in self.accumulate(micro, plan).items():
                metrics[name] = metrics.get(name, 0.0) + value
        means = engine.ranks.mean(torch.tensor([*metrics.values()], dtype=torch.float64))
        metrics = dict(zip(metrics, means.tolist(), strict=True))
        self._check(step, metrics)  # before the gradients of a loss that exploded are used
        if plan.by_router:
            self.controller.observe(metrics["share_spent"], asked=plan.drawn.budget)
        factor = learning_rate_factor(step, self.steps, config.warmup_steps)
        metrics |= engine.step(factor)
        for ffn in self._ffns:
            if ffn.copy is not None:
                ffn.copy.forget()
        asked = plan.drawn.budget if "dial" in plan.passes else 1.0
        return metrics | {"share_asked": asked, "learning_rate_factor": factor}

    def accumulate(self, micro: MicroBatch, plan: StepPlan) -> dict[str, float]:
        """Runs the passes of one micro-batch and accumulates its gradients.

        Returns:
            Its metrics, weighted by its share of the step.
        """
        outcome = Outcome(micro.batch.input_ids[:, 1:][micro.batch.predicted])
        if "parent" in plan.passes:
            with torch.no_grad():
                outcome.found["parent"] = self._forward(self.parent, micro.batch)
        metrics, scores = dict[str, float](), Recorder()
        if "full" in plan.passes:
            metrics, scores = self._full(micro, plan, outcome)
        if "dial" not in plan.passes:
            return metrics | {"share_spent": micro.weights["all"]}
        if "second" in plan.passes:
            with torch.no_grad():
                policy, _ = self._policy(plan.drawn.higher, scores, micro, plan)
                outcome.found["second"] = self._dynamic(micro.batch, policy)
        return metrics | self._dial(scores, micro, plan, outcome)

    def _full(self, micro: MicroBatch, plan: StepPlan, outcome: Outcome) -> tuple[dict[str, float], Recorder]:
        """The full dial, forward and backward: metrics, and what recorded the router's scores where routers decide."""
        trained = plan.trains("full") and self.config.trainable != "routers"
        recorder: Recorder | None = None
        if plan.by_router:
            router = self._ffns[0].router
            recorder = Recorder()
            if isinstance(router, SketchRouter):
                recorder = NeuronRecorder(router, attention_mask=micro.batch.attention_mask)
        with torch.set_grad_enabled(trained):
            outcome.found["full"] = self._dynamic(micro.batch, Full(scored=plan.by_router), recorder)
            total, metrics = self._summed("full", micro, plan, outcome)
        if trained:
            self.engine.backward(total, last=micro.last and "dial" not in plan.passes)
        outcome.found["full"] = outcome["full"].detach()
        return metrics, recorder or Recorder()

    def _dial(self, scores: Recorder, micro: MicroBatch, plan: StepPlan, outcome: Outcome) -> dict[str, float]:
        """The sampled dial, forward and backward: metrics."""
        policy, recorder = self._policy(plan.drawn.budget, scores, micro, plan)
        outcome.found["dial"] = self._dynamic(micro.batch, policy, recorder)
        if isinstance(recorder, LabelRecorder):
            outcome.found["labels"] = recorder.loss()
        total, metrics = self._summed("dial", micro, plan, outcome)
        centered, mask = isinstance(recorder, ScoreGradients), micro.batch.attention_mask
        self.engine.backward(total, last=micro.last and not centered)
        if isinstance(recorder, ScoreGradients):
            self.engine.backward(recorder.centering(self._ffns, self._mean(micro.batch)), last=micro.last)
            metrics["score_std"] = score_std(recorder, mask, self._ffns[0].router.features) * micro.weights["all"]
        metrics["share_spent"] = share_spent(recorder, mask) * micro.weights["all"]
        if plan.measured:
            accuracies = recorder.accuracies() if isinstance(recorder, LabelRecorder) else {}
            metrics |= micro_batch_statistics(micro, recorder, outcome, self.engine.network.layout.blocks, accuracies)
        return metrics

    def _policy(self, budget: float, recorded: Recorder, micro: MicroBatch, plan: StepPlan) -> tuple[Policy, Recorder]:
        """The policy that spends ``budget`` on this micro-batch, over all ranks, and what records it.

        Args:
            budget: Share of the parent's FFN bytes.
            recorded: Of the pass at the full dial: the routers' scores.
            micro: The micro-batch.
            plan: Of the step.
        """
        layout, router, cost = self.engine.network.layout, self._ffns[0].router, self._ffns[0].cost.bytes
        if not plan.by_router:
            return Uniform(uniform_width(budget, layout.partition)), Recorder()
        share = self.controller.request(budget)
        if isinstance(recorded, NeuronRecorder):
            recorded.gather(self.engine.ranks)
            threshold = recorded.scores_of_all.threshold(share, cost, self.exact_margin)
            return gated_policy(self.engine.network, budget, threshold, self.exact_margin), Recorder()
        scores = [self._real(found[0], micro.batch) for _, found in sorted(recorded.scores.items())]
        threshold = solve_threshold(router, scores, share, cost, mean=self._mean(micro.batch))
        if router.objective == "dial":
            return StraightThrough(threshold, self.config.temperature), ScoreGradients(micro.batch.attention_mask)
        policy = at_one_threshold(threshold, layout.layers, detached=True)
        if "labels" not in plan.passes:
            return policy, Recorder()
        target = TARGETS[router.objective](self.config)
        measured = threshold if plan.measured else None
        return policy, LabelRecorder(target, self._ffns, micro.batch.attention_mask, threshold=measured)

    def _summed(
        self, student: Pass, micro: MicroBatch, plan: StepPlan, outcome: Outcome
    ) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum of the losses that go through ``student``, and each of them by the name of its metric."""
        total, metrics = torch.zeros((), device=self.engine.device), dict[str, float]()
        for name, loss in plan.losses(student, outcome).items():
            objective = plan.objectives[name]
            loss = loss * micro.weights[objective.mean_over]
            metrics[objective.metric] = loss.item()
            if name in plan.weights:
                total = total + plan.weights[name] * loss
        return total, metrics

    def _dynamic(self, batch: Batch, policy: Policy, recorder: Recorder | None = None) -> Tensor:
        """Log-probabilities (M, V) of the model that is trained, under ``policy``."""
        with self.engine.network.call.using(policy, recorder):
            return self._forward(self.engine.model, batch)

    def _forward(self, model: Any, batch: Batch) -> Tensor:
        with self.engine.autocast():
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        return log_probabilities(logits, batch.predicted)

    @property
    def _ffns(self) -> list[Any]:
        ffns: list[Any] = self.engine.network.ffns()
        return ffns

    def _mean(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        """Takes the mean over ranks of means over tokens that are not padding."""
        return partial(self.engine.ranks.mean, weight=batch.tokens)

    def _real(self, scores: Tensor, batch: Batch) -> Tensor:
        return real_tokens(scores, batch.attention_mask, features=self._ffns[0].router.features)

    def _check(self, step: int, metrics: Mapping[str, float]) -> None:
        first = step * self.config.batch_size
        last = first + self.config.batch_size - 1
        batch = f"windows {first} to {last} of the training order that seed {self.seed} draws"
        self.watch.check(metrics, where=f"finetune, step {step + 1} of {self.steps}", batch=batch)
