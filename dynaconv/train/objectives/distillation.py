"""Knowledge distillation (Hinton et al., arXiv 1503.02531): a teacher's whole distribution in place of one token."""

from __future__ import annotations

from torch import Tensor

from dynaconv.config import FinetuneConfig
from dynaconv.train.objectives.base import Objective, Outcome, Pass, kl_divergence


class OfSampledDial(Objective):
    """KL(teacher || sampled dial); the teacher is the frozen parent, or the model's own full dial."""

    metric = "kl_dial"

    def __init__(self, tuning: FinetuneConfig) -> None:
        self.teacher: Pass = "parent" if tuning.teacher == "parent" else "full"
        self.needs = frozenset({"dial", self.teacher})

    def loss(self, outcome: Outcome) -> Tensor:
        """See :meth:`Objective.loss`."""
        return kl_divergence(outcome["dial"], outcome[self.teacher])


class OfFullDial(Objective):
    """KL(parent || full dial): keeps the quality of the full dial."""

    metric = "kl_full"

    def __init__(self, tuning: FinetuneConfig) -> None:
        self.needs = frozenset({"full", "parent"})

    def loss(self, outcome: Outcome) -> Tensor:
        """See :meth:`Objective.loss`."""
        return kl_divergence(outcome["full"], outcome["parent"])
