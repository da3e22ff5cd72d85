"""What happened inside a call: the one way to look at inputs, scores and choices of its sites.

Ships with every exported model. B sequences, T tokens, D residual width, F FFN width, L sites.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynaconv.dynamic.cost import FFNCost
from dynaconv.dynamic.site import Site
from dynaconv.kernels.choice import Choice


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
        return self._ones() if self.choice is None else self.choice.active_share(self.site.partition)

    def exact_share(self) -> Tensor:
        """Share of the neurons that each token uses with exact values, (B, T) float64."""
        return self._ones() if self.choice is None else self.choice.exact_share(self.site.partition)

    def bytes_share(self) -> Tensor:
        """Bytes read for each token as a share of the parent's FFN, the router counted, (B, T) float64."""
        if self.choice is None:
            return self._ones()
        return self.cost.bytes.of(self.active_share(), self.exact_share())

    def flops_share(self) -> Tensor:
        """FLOPs of each token as a share of the parent's FFN, the router counted, (B, T) float64."""
        if self.choice is None:
            return self._ones()
        return self.cost.flops.of(self.active_share(), self.exact_share())

    def _ones(self) -> Tensor:
        return torch.ones(self.x.shape[:-1], dtype=torch.float64, device=self.x.device)


class Recorder:
    """Keeps widths, shares and scores by site, in call order. Subclasses keep other things.

    Attributes:
        wants_hidden: Whether all activations are to be computed, and records to carry them.
        widths: By site, for each forward pass, (B, T) int64.
        shares: Active share by site, for each forward pass, (B, T) float64.
        costs: By site, for each forward pass, the shares of neurons with exact values, of bytes and of FLOPs, (3, B, T)
            float64.
        scores: By site, for each forward pass in which the policy looked at them.
    """

    wants_hidden = False

    def __init__(self) -> None:
        self.widths: dict[int, list[Tensor]] = {}
        self.shares: dict[int, list[Tensor]] = {}
        self.costs: dict[int, list[Tensor]] = {}
        self.scores: dict[int, list[Tensor]] = {}

    def record(self, record: Record) -> None:
        """Called by each site of each forward pass."""
        index = record.site.index
        self.widths.setdefault(index, []).append(record.widths().detach())
        self.shares.setdefault(index, []).append(record.active_share())
        costs = torch.stack([record.exact_share(), record.bytes_share(), record.flops_share()])
        self.costs.setdefault(index, []).append(costs)
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
        return _stacked(self.shares)

    def all_costs(self) -> Tensor:
        """Every cost recorded, (3, L, tokens) float64 (see :attr:`costs`), sites in order."""
        joined = [torch.cat([one.flatten(1) for one in self.costs[index]], 1) for index in sorted(self.costs)]
        return torch.stack(joined, dim=1)


def _stacked(found: dict[int, list[Tensor]]) -> Tensor:
    return torch.stack([torch.cat([one.flatten() for one in found[index]]) for index in sorted(found)])
