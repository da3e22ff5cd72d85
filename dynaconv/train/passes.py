"""One micro-batch at every dial of its step: forward passes, the losses they give, gradients accumulated.

The full dial comes first, then the sampled dial, which may be taught by it. What no loss needs is not run. Counted in
forward (f) and backward (b) passes, a step costs by default 3f + 2b, 7/3 of what dense training does: 2f + 2b of the
model, and 1f of the parent that teaches. Consistency adds 1f; the model's passes at the full dial only are 1f + 1b.

M scored tokens of the micro-batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dynaconv.config import FinetuneConfig
from dynaconv.data.windows import Batch
from dynaconv.dynamic.context import Trace, recording, using
from dynaconv.dynamic.policy import Full, Policy, Uniform
from dynaconv.dynamic.router import solve_level
from dynaconv.train.engine import Engine
from dynaconv.train.losses import AT_DIAL, cross_entropy, divergence, log_probabilities, weights
from dynaconv.train.routing import Gated, Labelled, Scored, real_tokens, spent_share
from dynaconv.train.sampler import Draw, draw, uniform_width
from dynaconv.train.statistics import router_statistics


@dataclass(frozen=True)
class Micro:
    """This rank's share of one micro-batch. Gradients and metrics are averaged over ranks.

    Attributes:
        batch: The windows.
        scored: Weight of means over its scored tokens: their share of the step's, times the number of ranks.
        real: Weight of means over all its tokens but padding, likewise.
        last: Whether the step's backward passes end with it.
    """

    batch: Batch
    scored: float
    real: float
    last: bool


@dataclass(frozen=True)
class Plan:
    """What a step runs.

    Attributes:
        drawn: Its dial.
        weights: Weight of each loss.
        at_dial: Whether the sampled dial is run beside the full one.
        drift: Share spent minus share asked so far, which is asked for less.
        measured: Whether statistics of the routers are taken.
    """

    drawn: Draw
    weights: Mapping[str, float]
    at_dial: bool
    drift: float = 0.0
    measured: bool = False

    @property
    def routed(self) -> bool:
        """Whether routers decide."""
        return self.at_dial and self.drawn.routed

    @classmethod
    def of(cls, config: FinetuneConfig, seed: int, step: int, steps: int, drift: float = 0.0) -> Plan:
        """The plan of ``step`` of ``steps``: a pure function of all these."""
        drawn, weight = draw(config, seed, step, steps), weights(config.losses, step, steps)
        labelled = drawn.routed and config.router in ("curve", "class") and weight["router"] > 0
        at_dial = not drawn.full and (labelled or any(weight[name] > 0 for name in AT_DIAL))
        every = config.statistics_every
        measured = at_dial and drawn.routed and every > 0 and step % every == 0
        return cls(drawn, weight, at_dial, drift, measured)


@dataclass
class Passes:
    """Runs micro-batches of a step.

    Attributes:
        engine: Model and optimiser.
        config: The recipe's ``finetune`` section.
        parent: The frozen dense model, where it teaches.
    """

    engine: Engine
    config: FinetuneConfig
    parent: Any = None

    def run(self, micro: Micro, plan: Plan) -> dict[str, float]:
        """Accumulates the gradients of one micro-batch; its metrics, weighted by its share of the step."""
        weights, distilled = plan.weights, plan.at_dial and plan.weights["distill"] > 0
        by_self = distilled and self.config.teacher == "self"
        by_parent = weights["distill_full"] > 0 or (distilled and not by_self)
        taught = self._taught(micro.batch) if by_parent else None
        scored: Scored | Full = Scored() if plan.routed else Full()
        full: Tensor | None = None
        metrics: dict[str, float] = {}
        if plan.routed or by_self or weights["full"] > 0 or weights["distill_full"] > 0:
            full, metrics = self._full(micro, plan, scored, taught)
        if not plan.at_dial:
            return metrics | {"share_spent": micro.real}
        return metrics | self._dial(micro, plan, scored, full, full if by_self else taught)

    def _full(self, micro: Micro, plan: Plan, policy: Policy, taught: Tensor | None) -> tuple[Tensor, dict[str, float]]:
        """The full dial; its log-probabilities (M, V) without gradient, and metrics."""
        weights, mask = plan.weights, micro.batch.predicted
        trained = weights["full"] + weights["distill_full"] > 0 and self.config.trainable != "routers"
        with torch.set_grad_enabled(trained):
            found = self._forward(micro.batch, policy)
            losses = {"loss_full": (weights["full"], cross_entropy(found, _targets(micro.batch, mask)))}
            if weights["distill_full"] > 0 and taught is not None:
                losses["kl_full"] = (weights["distill_full"], divergence(found, taught))
            total, metrics = _summed(losses, micro.scored)
        if trained:
            self.engine.backward(total, last=micro.last and not plan.at_dial)
        return found.detach(), metrics

    def _dial(
        self, micro: Micro, plan: Plan, scored: Scored | Full, full: Tensor | None, teacher: Tensor | None
    ) -> dict[str, float]:
        """The sampled dial, and the higher one that it is to agree with; metrics."""
        weights, batch, mask = plan.weights, micro.batch, micro.batch.predicted
        losses: dict[str, tuple[float, Tensor]] = {}
        higher = None
        if weights["consistency"] > 0:
            with torch.no_grad():
                higher = self._forward(batch, self._policy(micro, plan, plan.drawn.higher, scored))
        policy = self._policy(micro, plan, plan.drawn.budget, scored)
        with recording() as trace:
            found = self._forward(batch, policy)
        losses["loss_dial"] = (weights["dial"], cross_entropy(found, _targets(batch, mask)))
        if weights["distill"] > 0 and teacher is not None:
            losses["kl_dial"] = (weights["distill"], divergence(found, teacher))
        if higher is not None:
            losses["kl_consistency"] = (weights["consistency"], divergence(found, higher))
        total, metrics = _summed(losses, micro.scored)
        if isinstance(policy, Labelled):
            router = policy.loss() * micro.real
            total, metrics["loss_router"] = total + weights["router"] * router, router.item()
        gated = isinstance(policy, Gated)
        self.engine.backward(total, last=micro.last and not gated)
        if isinstance(policy, Gated):
            self.engine.backward(policy.centre(self.engine.network.ffns(), self._mean(batch)), last=micro.last)
            found_scores = [score.detach().float() for score in policy.scores.values()]
            metrics["score_deviation"] = torch.stack(self._real(found_scores, batch)).std().item() * micro.real
        widths = {layer: real_tokens(used, batch.attention_mask) for layer, used in _first(trace).items()}
        metrics["share_spent"] = micro.real * spent_share(widths, self.engine.network.layout.edges)
        if plan.measured and full is not None and isinstance(scored, Scored):
            accuracies = policy.accuracies if isinstance(policy, Labelled) else {}
            metrics |= self._statistics(micro, trace, full, accuracies)
        return metrics

    def _statistics(
        self, micro: Micro, trace: Trace, full: Tensor, accuracies: Mapping[int, float]
    ) -> dict[str, float]:
        batch, mask = micro.batch, micro.batch.predicted
        widths = {layer: used.view_as(batch.input_ids)[:, :-1][mask] for layer, used in _first(trace).items()}
        losses = -full.gather(1, _targets(batch, mask)[:, None])[:, 0]
        blocks = self.engine.network.layout.blocks
        found = router_statistics(widths, batch.input_ids[:, :-1][mask], losses, blocks, accuracies)
        return {name: value * micro.scored for name, value in found.items()}

    def _real(self, scores: Iterable[Tensor], batch: Batch) -> list[Tensor]:
        """Router scores of the tokens that are not padding, one tensor a layer."""
        features = self.engine.network.ffns()[0].router.features
        return [real_tokens(score, batch.attention_mask, features=features) for score in scores]

    def _mean(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        """Takes the mean over ranks of means over real tokens."""
        return partial(self.engine.ranks.mean, weight=batch.tokens)

    def _policy(self, micro: Micro, plan: Plan, budget: float, scored: Scored | Full) -> Policy:
        """The policy that spends ``budget`` on this micro-batch, over all ranks."""
        network = self.engine.network
        if not isinstance(scored, Scored):
            return Uniform(uniform_width(budget, network.layout.blocks))
        asked, real = min(1.0, max(0.01, budget - plan.drift)), micro.batch.attention_mask
        scores = self._real(scored.scores.values(), micro.batch)
        level = solve_level(network.ffns()[0].router, scores, asked, mean=self._mean(micro.batch))
        if self.config.router == "gate":
            return Gated(level, self.config.temperature, real)
        return Labelled(level, self.config.theta, real, measured=plan.measured)

    def _forward(self, batch: Batch, policy: Policy, model: Any = None) -> Tensor:
        """Log-probabilities (M, V)."""
        model = self.engine.model if model is None else model
        with using(policy), self.engine.autocast():
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        return log_probabilities(logits, batch.predicted)

    def _taught(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self._forward(batch, Full(), self.parent)


def _targets(batch: Batch, mask: Tensor) -> Tensor:
    return batch.input_ids[:, 1:][mask]


def _first(trace: Trace) -> dict[int, Tensor]:
    return {layer: widths[0] for layer, widths in trace.widths.items()}


def _summed(losses: Mapping[str, tuple[float, Tensor]], share: float) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum of ``losses``, those that weigh nothing left out, and each by itself, all times ``share``."""
    weighted = [weight * share * loss for weight, loss in losses.values() if weight > 0]
    total = torch.stack(weighted).sum() if weighted else torch.zeros(())
    return total, {name: share * loss.item() for name, (_, loss) in losses.items()}
