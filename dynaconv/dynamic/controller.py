"""Holds the mean cost of what is generated at the budget that was asked for. Ships with every exported model.

Thresholds are calibrated on some text; on other text they spend more or less. A controller shifts them by what has been
spent too much so far, token by token and therefore causally. Its state belongs to one call of ``generate``.

L sites, S dials.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dynaconv.dynamic.cost import UnitCost
from dynaconv.dynamic.policy import ByThreshold, Decision
from dynaconv.dynamic.recorder import shares_of
from dynaconv.dynamic.routers.base import Router
from dynaconv.dynamic.site import Site

GAIN = 0.1
"""Part of the excess over all tokens so far that is to be saved with the next token."""


@dataclass(eq=False)
class Controlled:
    """Policy of routers whose thresholds follow what was spent.

    Attributes:
        policy: The calibrated thresholds.
        budgets: Asked for, (), or (S,) with one dial a sequence.
        slopes: How much a threshold rises for each unit of budget less, likewise.
        cost: Of a site, in bytes.
        sites: L.
        excess: Bytes spent too much over all tokens so far, shares of the FFN, likewise.
    """

    policy: ByThreshold
    budgets: Tensor
    slopes: Tensor
    cost: UnitCost
    sites: int
    excess: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.excess = torch.zeros_like(self.budgets)

    def decide(self, site: Site, router: Router, x: Tensor) -> Decision:
        """What each token uses at the shifted thresholds; the shift moves on behind the last site."""
        shift = (GAIN * self.slopes * self.excess)[..., None]
        exact = None if self.policy.exact is None else self.policy.exact + shift
        policy = replace(self.policy, thresholds=self.policy.thresholds + shift, exact=exact)
        decision = policy.decide(site, router, x)
        if decision.choice is not None:
            spent = self.cost.of(*shares_of(decision.choice, site.partition))  # (B, T)
            self._observe(spent.float())
        return decision

    def require(self, sequences: int) -> None:
        """See :meth:`ByThreshold.require`."""
        self.policy.require(sequences)

    def _observe(self, spent: Tensor) -> None:
        """Adds what the tokens of a site have spent, (B, T) or (B * T): each site is an L-th of its token."""
        dials = self.budgets.numel()
        by_dial = spent.reshape(dials, -1)  # one dial a sequence, in order
        tokens = by_dial.shape[1] if self.budgets.dim() else 1  # sequences of one dial count as one
        over = (by_dial.mean(1) - self.budgets.view(-1)) * tokens / self.sites
        self.excess += over.view_as(self.excess)
