"""Which blocks of a site a token uses, by the dial. Ships with every exported model.

B sequences, T tokens, D residual width, N blocks, L sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dynaconv.dynamic.routers.base import Router
from dynaconv.dynamic.site import Site
from dynaconv.kernels.choice import Choice


class Decision(NamedTuple):
    """What the tokens of a call use of a site.

    Attributes:
        choice: The blocks; ``None`` for all.
        scores: The router's scores, where the policy looked at them.
    """

    choice: Choice | None
    scores: Tensor | None = None


class Policy(Protocol):
    """Decides, site by site, which blocks the tokens of a call use."""

    def decide(self, site: Site, router: Router, x: Tensor) -> Decision:
        """What the tokens ``x`` (B, T, D) use of ``site``; (B * T, D) where the model flattens them."""


@dataclass(frozen=True)
class Full:
    """All blocks for all tokens.

    Attributes:
        scored: Also run the routers, whose scores a recorder wants.
    """

    scored: bool = False

    def decide(self, site: Site, router: Router, x: Tensor) -> Decision:
        """Nothing is left out, and scores get no gradient."""
        with torch.no_grad():
            return Decision(None, router(x) if self.scored else None)


@dataclass(frozen=True)
class Uniform:
    """The same number of blocks for all tokens and sites: the first, or of routed experts the most wanted (top-k)."""

    width: int

    def decide(self, site: Site, router: Router, x: Tensor) -> Decision:
        """``width`` blocks, or all where the site has no more."""
        if self.width >= site.blocks:
            return Decision(None)
        return Decision(router.top(x, self.width))


@dataclass(frozen=True)
class Static:
    """One width a site, the same for all tokens.

    Attributes:
        widths: L widths.
    """

    widths: Sequence[int]

    def decide(self, site: Site, router: Router, x: Tensor) -> Decision:
        """The site's width."""
        return Uniform(self.widths[site.index]).decide(site, router, x)


@dataclass(frozen=True, eq=False)
class ByThreshold:
    """What the routers choose at a threshold each.

    Attributes:
        thresholds: (L,) one threshold a site, or (B, L) one a site and sequence; on the model's device.
        detached: Whether routers see the tokens without their gradient.
    """

    thresholds: Tensor
    detached: bool = False

    def require(self, sequences: int) -> None:
        """Checks the number of dials against a batch of so many sequences.

        Raises:
            ValueError: The number of dials does not divide the batch.
        """
        if self.thresholds.dim() == 2 and sequences % self.thresholds.shape[0]:
            found = f"{self.thresholds.shape[0]} dials for a batch of {sequences} sequences"
            raise ValueError(f"{found}: give one for each")

    def decide(self, site: Site, router: Router, x: Tensor) -> Decision:
        """What each token's router asks for.

        Raises:
            ValueError: The number of dials does not divide the batch.
        """
        scores = router(x.detach() if self.detached else x)
        return Decision(router.choose(scores.detach() if self.detached else scores, self.threshold(site, x)), scores)

    def threshold(self, site: Site, x: Tensor) -> Tensor:
        """The threshold of each token of ``x`` (B, T, D), broadcastable to (B, T)."""
        threshold = self.thresholds[..., site.index].to(x.device)
        if threshold.dim():  # one dial a sequence; beams and returned sequences repeat each row in place
            self.require(x.shape[0])
            threshold = threshold.repeat_interleave(x.shape[0] // threshold.shape[0], dim=0)
            threshold = threshold.view(-1, *(1,) * (x.dim() - 2))
        return threshold


def at_one_threshold(threshold: float, sites: int, *, detached: bool = False) -> ByThreshold:
    """The same threshold for all ``sites``."""
    return ByThreshold(torch.full((sites,), threshold), detached)
