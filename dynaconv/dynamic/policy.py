"""Which blocks of a layer a token uses, by the dial.

B batch, T tokens, D residual width, N blocks, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dynaconv.dynamic.ffn import DynamicFFN


class Policy(Protocol):
    """Decides, layer by layer, which blocks the tokens of a call use."""

    def decide(self, ffn: DynamicFFN, x: Tensor) -> Tensor | None:
        """What the tokens ``x`` (B, T, D) use of ``ffn``; (B * T, D) where the model flattens them.

        Returns:
            ``None``: all blocks. An integer tensor (B, T): the first so many. A bool tensor (B, T, N): those blocks. A
            floating tensor (B, T, N): each block times its entry, through which gradients may flow. Flat where ``x``
            is.
        """


@dataclass(frozen=True)
class Full:
    """All blocks for all tokens."""

    def decide(self, ffn: DynamicFFN, x: Tensor) -> Tensor | None:
        """Nothing is left out."""
        return None


@dataclass(frozen=True)
class Uniform:
    """The same number of blocks for all tokens and layers: the first, or of routed experts the most wanted (top-k)."""

    width: int

    def decide(self, ffn: DynamicFFN, x: Tensor) -> Tensor | None:
        """``width`` blocks, or all where the FFN has no more."""
        if self.width >= ffn.blocks:
            return None
        if ffn.router.kind == "blocks":
            return ffn.router.most_wanted(ffn.router(x), self.width)
        return torch.full(x.shape[:-1], self.width, dtype=torch.int64, device=x.device)


@dataclass(frozen=True)
class Static:
    """One width a layer, the same for all tokens.

    Attributes:
        widths: L widths.
    """

    widths: Sequence[int]

    def decide(self, ffn: DynamicFFN, x: Tensor) -> Tensor | None:
        """The layer's width."""
        return Uniform(self.widths[ffn.layer]).decide(ffn, x)


@dataclass(frozen=True)
class Routed:
    """What the routers choose at a level each.

    Attributes:
        levels: (L,) one level a layer, or (B, L) one a layer and sequence.
    """

    levels: Tensor

    def require(self, sequences: int) -> None:
        """Checks the number of dials against a batch of so many sequences.

        Raises:
            ValueError: The number of dials does not divide the batch.
        """
        if self.levels.dim() == 2 and sequences % len(self.levels):
            raise ValueError(f"{len(self.levels)} dials for a batch of {sequences} sequences: give one for each")

    def decide(self, ffn: DynamicFFN, x: Tensor) -> Tensor | None:
        """What each token's router asks for.

        Raises:
            ValueError: The number of dials does not divide the batch.
        """
        level = self.levels[..., ffn.layer].to(x.device)
        if level.dim():  # one dial a sequence; beams and returned sequences repeat each row in place
            self.require(x.shape[0])
            level = level.repeat_interleave(x.shape[0] // level.shape[0], dim=0)
            level = level.view(-1, *(1,) * (x.dim() - 2))
        return ffn.router.choose(ffn.router(x), level)
