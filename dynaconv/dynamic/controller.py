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
from dynaconv.dynamic.policy import ByThreshold, Decision, by_sequence
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
        self._rates: Tensor | None = None
        self._begin(len(self.budgets))

    def _begin(self, sequences: int) -> None:
        self.excess, repeats = self.budgets.new_zeros(sequences), sequences // len(self.budgets)
        self._asked = self.budgets.repeat_interleave(repeats)
        self._gain = GAIN * self.slopes.repeat_interleave(repeats)

    def require(self, sequences: int) -> None:
        """Says of how many sequences the next forward pass is; another number than before begins anew.

        Raises:
            ValueError: The number of dials does not divide the batch.
        """
        self.policy.require(sequences)
        if len(self.excess) != sequences:
            self._begin(sequences)

    def decide(self, site: Site, router: Router, x: Tensor) -> Decision:
        """What each token uses at the shifted thresholds of its sequence."""
        shift = (self._gain * self.excess)[:, None]
        thresholds, exact = (None if one is None else _by_row(one, len(shift)) + shift
                             for one in (self.policy.thresholds, self.policy.exact))  # fmt: skip
        assert thresholds is not None
        decision = replace(self.policy, thresholds=thresholds, exact=exact).decide(site, router, x)
        if decision.choice is not None:
            self.observe(*shares_of(decision.choice, site.partition))
        return decision

    def of_site(self, thresholds: Tensor, site: Site, x: Tensor) -> Tensor:
        """As :meth:`ByThreshold.of_site`, shifted, (B, 1), or (B * T,) where the model flattens its tokens."""
        own = thresholds[..., site.index]
        if own.dim() and len(own) != len(self.excess):
            own = own.repeat_interleave(len(self.excess) // len(own))
        return by_sequence(own + self._gain * self.excess, x)

    def observe_counts(self, counts: Tensor, neurons: int) -> None:
        """The same from numbers of neurons (M, 3) that were looked at twice, are on, are exact."""
        if self._rates is None:
            cost = self.cost
            self._rates = torch.tensor([cost.closer, cost.low, cost.exact - cost.low], device=counts.device) / neurons
        spent = (counts.float() @ self._rates).view(len(self.excess), -1) + self.cost.fixed
        self.excess += (spent.mean(1) - self._asked) * (spent.shape[1] / self.sites)

    def observe(self, active: Tensor, exact: Tensor, closer: Tensor) -> None:
        """Takes note of what tokens used of one site: shares of neurons, all tokens of a sequence after one another."""
        spent = self.cost.of(active, exact, closer).view(len(self.excess), -1).float()
        self.excess += (spent.mean(1) - self._asked) * (spent.shape[1] / self.sites)  # each site is an L-th of a token


def _by_row(thresholds: Tensor, rows: int) -> Tensor:
    """``thresholds``, (L,) or (S, L), of each of ``rows`` sequences."""
    return thresholds if thresholds.dim() == 1 else thresholds.repeat_interleave(rows // len(thresholds), dim=0)
