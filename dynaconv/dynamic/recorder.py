"""What happened inside a call: the one way to look at inputs, scores and choices of its sites.

Ships with every exported model. B sequences, T tokens, D residual width, F FFN width, L sites.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dynaconv.dynamic.cost import FFNCost
from dynaconv.dynamic.site import Site
from dynaconv.kernels.choice import Choice, Prefix, Subset
from dynaconv.kernels.partition import Partition


@dataclass(frozen=True, eq=False)
class Record:
    """One site in one forward pass.

    Attributes:
        site: Which.
        x: The FFN's input (B, T, D); (B * T, D) where the model flattens its tokens.
        choice: What tokens use; ``None`` for all blocks.
        scores: The router's scores, where the policy looked at them.
        hidden: Activations of all neurons (B, T, F) before any is left out, where they were computed.
        cost: What the site's FFN costs.
    """

    site: Site
    x: Tensor
    choice: Choice | None
    scores: Tensor | None
    hidden: Tensor | None
    cost: FFNCost

    def widths(self) -> Tensor:
        """Blocks that each token uses, (B, T) int64."""
        if self.choice is None:
            return torch.full(self.x.shape[:-1], self.site.blocks, dtype=torch.int64, device=self.x.device)
        return self.choice.width()

    def active_share(self) -> Tensor:
        """Share of the neurons that each token uses, (B, T) float64."""
        return self.shares[0]

    def bytes_share(self) -> Tensor:
        """Bytes read for each token as a share of the parent's FFN, the router counted, (B, T) float64."""
        return self.shares[2]

    @cached_property
    def shares(self) -> Tensor:
        """Of each token: active neurons, exact ones, bytes and FLOPs of the parent's FFN, (4, B, T) float64.

        Bytes and FLOPs count the router.
        """
        if self.choice is None:
            return torch.ones(4, *self.x.shape[:-1], dtype=torch.float64, device=self.x.device)
        active, exact, closer = shares_of(self.choice, self.site.partition)
        idle = self.scores is None and isinstance(self.choice, Prefix)  # the first blocks for all: no router ran
        costs = (unit.of(active, exact, closer) - idle * unit.fixed for unit in self.cost)
        return torch.stack([active, exact, *costs])


def shares_of(choice: Choice, partition: Partition) -> tuple[Tensor, Tensor, Tensor]:
    """Shares of the neurons that are active, have exact values, and were looked at twice, (...) float64 each."""
    active = choice.active_share(partition)
    if isinstance(choice, Subset):
        return active, choice.exact_share(partition), choice.closer_share(partition)
    return active, active, torch.zeros_like(active)


class Recorder:
    """Keeps widths, shares and scores by site, in call order. Subclasses keep other things.

    Attributes:
        wants_hidden: Whether all activations are to be computed, and records to carry them.
        widths: By site, for each forward pass, (B, T) int64.
        shares: By site, for each forward pass, (4, B, T) float64; see :attr:`Record.shares`.
        scores: By site, for each forward pass in which the policy looked at them.
    """

    wants_hidden = False

    def __init__(self) -> None:
        self.widths: dict[int, list[Tensor]] = {}
        self.shares: dict[int, list[Tensor]] = {}
        self.scores: dict[int, list[Tensor]] = {}

    def record(self, record: Record) -> None:
        """Called by each site of each forward pass."""
        index = record.site.index
        self.widths.setdefault(index, []).append(record.widths().detach())
        self.shares.setdefault(index, []).append(record.shares)
        if record.scores is not None:
            self.scores.setdefault(index, []).append(record.scores.detach())

    def in_recomputation(self) -> Recorder | None:
        """What records while activation checkpointing computes a forward pass again; by default nothing does."""
        return None

    def all_widths(self) -> Tensor:
        """Every width recorded, (L, tokens) int64, sites in order."""
        return _stacked(self.widths)

    def all_shares(self) -> Tensor:
        """Every active share recorded, (L, tokens) float64, sites in order."""
        return self.all_costs()[0]

    def all_costs(self) -> Tensor:
        """All shares recorded (see :attr:`Record.shares`), (4, L, tokens) float64, sites in order."""
        joined = [torch.cat([one.flatten(1) for one in self.shares[index]], 1) for index in sorted(self.shares)]
        return torch.stack(joined, dim=1)


def _stacked(found: dict[int, list[Tensor]]) -> Tensor:
    return torch.stack([torch.cat([one.flatten() for one in found[index]]) for index in sorted(found)])
