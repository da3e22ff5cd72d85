"""Next-token cross-entropy, at the full dial and at the sampled one."""

from __future__ import annotations

from torch import Tensor

from dynaconv.config import FinetuneConfig
from dynaconv.train.objectives.base import Objective, Outcome, cross_entropy


class FullDial(Objective):
    """Cross-entropy at the full dial."""

    metric = "loss_full"
    reported = True

    def __init__(self, tuning: FinetuneConfig) -> None:
        self.needs = frozenset({"full"})

    def loss(self, outcome: Outcome) -> Tensor:
        """See :meth:`Objective.loss`."""
        return cross_entropy(outcome["full"], outcome.targets)


class SampledDial(Objective):
    """Cross-entropy at the sampled dial."""

    metric = "loss_dial"
    reported = True

    def __init__(self, tuning: FinetuneConfig) -> None:
        self.needs = frozenset({"dial"})

    def loss(self, outcome: Outcome) -> Tensor:
        """See :meth:`Objective.loss`."""
        return cross_entropy(outcome["dial"], outcome.targets)
