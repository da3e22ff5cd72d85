"""Which blocks of a site a token uses, by the dial. Ships with every exported model.

B sequences, T tokens, D residual width, N blocks, L sites, G sets of means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dynaconv.dynamic.routers.base import Router
from dynaconv.dynamic.site import Site
from dynaconv.kernels.choice import Choice, Prefix, Subset


class Decision(NamedTuple):
    """What the tokens of a call use of a site.

    Attributes:
        choice: The blocks; ``None`` for all.
        scores: The router's scores, where the policy looked at them.
        means: Weights of the site's G sets of means, which neurons give that are off: ``(G,)``, or ``(B, G)`` where
            sequences differ; ``None`` where such neurons give nothing.
    """

    choice: Choice | None
    scores: Tensor | None = None
    means: Tensor | None = None


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
        exact: Thresholds above which a block has exact values, of the same shape: blocks between the two have low-bit
            ones. ``None``: all blocks that are on are exact.
        means: See :class:`Decision`.
    """

    thresholds: Tensor
    detached: bool = False
    exact: Tensor | None = None
    means: Tensor | None = None

    def clone(self) -> ByThreshold:
        """The same with memory of its own."""
        exact, means = (None if one is None else one.clone() for one in (self.exact, self.means))
        return replace(self, thresholds=self.thresholds.clone(), exact=exact, means=means)

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
        compared = scores.detach() if self.detached else scores
        choice = router.choose(compared, self.of_site(self.thresholds, site, x))
        if self.exact is not None and isinstance(choice, Subset):
            choice = replace(choice, exact=router.choose(compared, self.of_site(self.exact, site, x)).mask(site.blocks))
        return Decision(choice, scores, self.means)

    def of_site(self, thresholds: Tensor, site: Site, x: Tensor) -> Tensor:
        """The threshold of each token of ``x`` (B, T, D) among ``thresholds``, broadcastable to (B, T)."""
        threshold = thresholds[..., site.index].to(x.device)
        return by_sequence(threshold, x) if threshold.dim() else threshold


def by_sequence(values: Tensor, x: Tensor) -> Tensor:
    """What each token of ``x`` (B, T, D) has of ``values`` (S, ...): (B, 1, ...), to be broadcast over tokens.

    Raises:
        ValueError: S does not divide the batch.
    """
    # Beams and returned sequences repeat each row in place.
    if x.shape[0] % values.shape[0]:
        found = f"{values.shape[0]} dials for a batch of {x.shape[0]} sequences"
        raise ValueError(f"{found}: give one for each")
    if x.shape[0] != values.shape[0]:
        values = values.repeat_interleave(x.shape[0] // values.shape[0], dim=0)
    return values.view(values.shape[0], *(1,) * (x.dim() - 2), *values.shape[1:])


@dataclass(frozen=True)
class AfterPrompt:
    """Policy of sequences whose beginning is a prompt, read at the full dial; the rest is up to another policy.

    Attributes:
        policy: Of the rest.
        prompt: Tokens of the prompt.
        length: Tokens of a sequence.
    """

    policy: Policy
    prompt: int
    length: int

    def decide(self, site: Site, router: Router, x: Tensor) -> Decision:
        """What the tokens use; all of the prompt's use everything."""
        found = self.policy.decide(site, router, x)
        if found.choice is None:
            return found
        rows = x.numel() // x.shape[-1]
        prompt = (torch.arange(rows, device=x.device) % self.length < self.prompt).view(x.shape[:-1])
        return found._replace(choice=_all_of(found.choice, prompt, site.blocks))


def at_one_threshold(
    threshold: float,
    sites: int,
    *,
    detached: bool = False,
    exact: float | None = None,
    means: Tensor | None = None,
) -> ByThreshold:
    """The same threshold for all ``sites``; the other arguments as of :class:`ByThreshold`."""
    above = None if exact is None else torch.full((sites,), exact)
    return ByThreshold(torch.full((sites,), threshold), detached, above, means)


def _all_of(choice: Choice, tokens: Tensor, blocks: int) -> Choice:
    """``choice`` (...) with every block, exact, for the ``tokens`` (...) that are True."""
    if isinstance(choice, Prefix):
        return Prefix(choice.widths.masked_fill(tokens, blocks))
    assert isinstance(choice, Subset)
    exact = None if choice.exact is None else choice.exact | tokens[..., None]
    return Subset(choice.on | tokens[..., None], exact, choice.closer)
