"""Training targets of routers that do not learn from the losses at the dial: difficulty measured in the same pass.

A router whose class names the objective ``curve`` regresses the log relative error of every width (D2DMoE, arXiv
2310.04361); one that names ``class`` classifies the smallest width whose output agrees with the full one (DynaMoE,
arXiv 2502.12325). The model itself gets no gradient from either.

M tokens that are not padding, D residual width, F FFN width, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dynaconv.config import FinetuneConfig
from dynaconv.dynamic.ffn import DynamicFFN
from dynaconv.dynamic.recorder import Record, Recorder
from dynaconv.dynamic.routers.base import Router
from dynaconv.kernels.partition import Partition
from dynaconv.profile.curves import agreements, log_errors, relative_errors, width_by_cosine
from dynaconv.train.objectives.base import Objective, Outcome
from dynaconv.train.router_kinds import router_objective
from dynaconv.train.tokens import real_tokens
from dynaconv.train.trainable import down_weight


class RouterTargets(Objective):
    """Mean loss of the routers against their labels, for kinds of router that have labels."""

    metric = "loss_router"
    mean_over = "all"

    def __init__(self, tuning: FinetuneConfig) -> None:
        self.needs = frozenset({"dial", "labels"}) if router_objective(tuning) in TARGETS else frozenset()

    def loss(self, outcome: Outcome) -> Tensor:
        """See :meth:`Objective.loss`."""
        return outcome["labels"]


class Target(Protocol):
    """What a router is compared with."""

    def labels(self, hidden: Tensor, down: Tensor, partition: Partition) -> Tensor:
        """Labels (M, ...) of tokens with activations ``hidden`` (M, F), for the down projection ``down`` (D, F)."""

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean loss () of ``scores`` (M, N)."""

    def right(self, router: Router, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
        """Which tokens the router is right about, (M,) bool."""


class CurveTarget:
    """Log relative error of every width, by mean squared error. Right is the width that the true curve gives."""

    def __init__(self, tuning: FinetuneConfig) -> None:
        pass

    def labels(self, hidden: Tensor, down: Tensor, partition: Partition) -> Tensor:
        """(M, N) float32."""
        return log_errors(relative_errors(hidden, down, partition.edges))

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """See :meth:`Target.loss`."""
        return functional.mse_loss(scores, labels)

    def right(self, router: Router, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
        """See :meth:`Target.right`."""
        return router.choose(scores, threshold).width() == router.choose(labels, threshold).width()


class ClassTarget:
    """Smallest width whose output has a cosine of at least ``finetune.theta`` with the full one, by cross-entropy."""

    def __init__(self, tuning: FinetuneConfig) -> None:
        self.cosine_threshold = tuning.theta

    def labels(self, hidden: Tensor, down: Tensor, partition: Partition) -> Tensor:
        """(M,) int64, widths from 1 to N."""
        return width_by_cosine(agreements(hidden, down, partition.edges).cosines, self.cosine_threshold)

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """See :meth:`Target.loss`."""
        return functional.cross_entropy(scores, labels - 1)

    def right(self, router: Router, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
        """See :meth:`Target.right`."""
        return scores.argmax(-1) + 1 == labels


TARGETS: dict[str, Callable[[FinetuneConfig], Target]] = {"curve": CurveTarget, "class": ClassTarget}


class _Found(NamedTuple):
    """Of one site."""

    loss: Tensor
    right: Tensor | None


class LabelRecorder(Recorder):
    """Compares the scores of every site with labels measured from the activations of the same pass.

    Args:
        target: What labels are.
        ffns: The model's FFNs, whose down projections the labels are measured with.
        mask: (B, T) bool, False on padding; ``None`` where nothing is padded.
        threshold: Of all routers, to find out which tokens they are right about; ``None`` leaves that out.
    """

    wants_hidden = True

    def __init__(
        self, target: Target, ffns: list[DynamicFFN], mask: Tensor | None = None, *, threshold: float | None = None
    ) -> None:
        super().__init__()
        self.target, self.mask, self.threshold = target, mask, threshold
        self._ffns = {ffn.site.index: ffn for ffn in ffns}
        self._found: dict[int, _Found] = {}

    def record(self, record: Record) -> None:
        """Measures the labels of a site, and the loss of its scores."""
        assert record.scores is not None and record.hidden is not None
        ffn = self._ffns[record.site.index]
        scores = real_tokens(record.scores, self.mask, features=1)
        hidden, down = real_tokens(record.hidden.detach(), self.mask, features=1).float(), down_weight(ffn).detach()
        labels = self.target.labels(hidden, down, record.site.partition)
        loss = self.target.loss(scores, labels)
        if record.site.index in self._found:  # a recomputation, which has to repeat every operation, but counts once
            return
        right = None
        if self.threshold is not None:
            right = self.target.right(ffn.router, scores.detach(), labels, self.threshold)
        self._found[record.site.index] = _Found(loss, right)
        super().record(record)

    def in_recomputation(self) -> Recorder:
        """This one: backward needs every operation of the forward pass again, those of the router's loss included."""
        return self

    def loss(self) -> Tensor:
        """Mean over sites, ()."""
        return torch.stack([found.loss for found in self._found.values()]).mean()

    def accuracies(self) -> dict[int, float]:
        """By site, the share of tokens that the router is right about."""
        found = {index: one.right for index, one in self._found.items()}
        return {index: right.float().mean().item() for index, right in found.items() if right is not None}
