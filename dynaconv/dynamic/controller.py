"""Holds the mean cost of what is generated at the budget that was asked for. Ships with every exported model.

Thresholds are calibrated on some text; on other text they spend more or less. A controller shifts them by what has been
spent too much so far, token by token and therefore causally. Its state belongs to one call of ``generate``.

B sequences, L sites, S dials.
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
    """Policy of routers whose thresholds follow what each sequence has spent.

    Attributes:
        policy: The calibrated thresholds.
        budgets: Asked for, (S,): one for all sequences, or one each.
        slopes: How much thresholds rise for each unit of budget less, likewise.
        cost: Of a site, in bytes.
        sites: L.
        excess: Bytes that each sequence of the batch has spent too much over all its tokens, shares of the FFN, (B,).
    """

    policy: ByThreshold
    budgets: Tensor
    slopes: Tensor
    cost: UnitCost
    sites: int
    excess: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.excess = torch.zeros_like(self.budgets)

    def require(self, sequences: int) -> None:
        """Says of how many sequences the next forward pass is; another number than before begins anew.

        Raises:
            ValueError: The number of dials does not divide the batch.
        """
        self.policy.require(sequences)
        if len(self.excess) != sequences:
            self.excess = self.excess.new_zeros(sequences)

    def decide(self, site: Site, router: Router, x: Tensor) -> Decision:
        """What each token uses at the shifted thresholds of its sequence."""
        repeats = len(self.excess) // len(self.budgets)
        budgets, slopes = (one.repeat_interleave(repeats) for one in (self.budgets, self.slopes))
        shift = (GAIN * slopes * self.excess)[:, None]
        thresholds, exact = (None if one is None else _by_row(one, len(shift)) + shift
                             for one in (self.policy.thresholds, self.policy.exact))  # fmt: skip
        assert thresholds is not None
        decision = replace(self.policy, thresholds=thresholds, exact=exact).decide(site, router, x)
        if decision.choice is not None:
            spent = self.cost.of(*shares_of(decision.choice, site.partition)).view(len(shift), -1).float()
            self.excess += (spent.mean(1) - budgets) * (spent.shape[1] / self.sites)  # each site is an L-th of a token
        return decision


def _by_row(thresholds: Tensor, rows: int) -> Tensor:
    """``thresholds``, (L,) or (S, L), of each of ``rows`` sequences."""
    return thresholds if thresholds.dim() == 1 else thresholds.repeat_interleave(rows // len(thresholds), dim=0)
