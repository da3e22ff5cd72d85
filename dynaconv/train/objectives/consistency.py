"""Agreement of two dials on the same batch: the lower one learns from the higher one, which gets no gradient."""

from __future__ import annotations

from torch import Tensor

from dynaconv.config import FinetuneConfig
from dynaconv.train.objectives.base import Objective, Outcome, kl_divergence


class Consistency(Objective):
    """KL(second, higher dial || sampled dial)."""

    metric = "kl_consistency"

    def __init__(self, tuning: FinetuneConfig) -> None:
        self.needs = frozenset({"dial", "second"})

    def loss(self, outcome: Outcome) -> Tensor:
        """See :meth:`Objective.loss`."""
        return kl_divergence(outcome["dial"], outcome["second"])
