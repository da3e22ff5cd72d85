"""What tokens use of an FFN that is cut into N blocks. Ships with every exported model.

Three forms, each over the tokens ``(...)`` of a call. ``None`` stands for every block of every token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynaconv.kernels.partition import Partition


@dataclass(frozen=True, eq=False)
class Prefix:
    """The first blocks, so many for each token.

    Attributes:
        widths: ``(...)`` int64, 0 to N.
    """

    widths: Tensor

    def mask(self, blocks: int) -> Tensor:
        """Which blocks each token uses, ``(..., N)`` bool."""
        return self.widths[..., None] > torch.arange(blocks, device=self.widths.device)

    def width(self) -> Tensor:
        """How many blocks each token uses, ``(...)`` int64."""
        return self.widths

    def active_share(self, partition: Partition) -> Tensor:
        """Share of the neurons that each token uses, ``(...)`` float64."""
        return partition.prefix_shares(self.widths.device)[self.widths]

    def rows(self) -> Prefix:
        """The same with the tokens in one dimension."""
        return Prefix(self.widths.reshape(-1))


@dataclass(frozen=True, eq=False)
class Subset:
    """Any blocks.

    Attributes:
        on: ``(..., N)`` bool.
        exact: Which of these have the weights' exact values, ``(..., N)`` bool; the others have their low-bit ones.
            ``None`` where all of them are exact.
        closer: Blocks that the router looked at twice to choose, ``(..., N)`` bool; all of ``on`` are among them.
            ``None`` where it looks once. It matters to the cost alone.
    """

    on: Tensor
    exact: Tensor | None = None
    closer: Tensor | None = None

    def mask(self, blocks: int) -> Tensor:
        """Which blocks each token uses, ``(..., N)`` bool."""
        return self.on

    def width(self) -> Tensor:
        """How many blocks each token uses, ``(...)`` int64."""
        return _count(self.on).long()

    def active_share(self, partition: Partition) -> Tensor:
        """Share of the neurons that each token uses, ``(...)`` float64."""
        return _share(self.on, partition)

    def exact_share(self, partition: Partition) -> Tensor:
        """Share of the neurons that each token uses with exact values, ``(...)`` float64."""
        return _share(self.on if self.exact is None else self.exact, partition)

    def closer_share(self, partition: Partition) -> Tensor:
        """Share of the neurons that the router looked at twice, ``(...)`` float64; zeros where it looks once."""
        if self.closer is None:
            return torch.zeros(self.on.shape[:-1], dtype=torch.float64, device=self.on.device)
        return _share(self.closer, partition)

    def rows(self) -> Subset:
        """The same with the tokens in one dimension."""
        exact, closer = (None if one is None else one.flatten(0, -2) for one in (self.exact, self.closer))
        return Subset(self.on.reshape(-1, self.on.shape[-1]), exact, closer)


@dataclass(frozen=True, eq=False)
class Soft:
    """Every block, multiplied by a weight through which gradients may flow; above one half counts as used.

    Attributes:
        weight: ``(..., N)`` floating point.
    """

    weight: Tensor

    def mask(self, blocks: int) -> Tensor:
        """The weights, ``(..., N)``."""
        return self.weight

    def width(self) -> Tensor:
        """How many blocks each token uses, ``(...)`` int64."""
        return self._used().width()

    def active_share(self, partition: Partition) -> Tensor:
        """Share of the neurons that each token uses, ``(...)`` float64."""
        return self._used().active_share(partition)

    def rows(self) -> Soft:
        """The same with the tokens in one dimension."""
        return Soft(self.weight.reshape(-1, self.weight.shape[-1]))

    def _used(self) -> Subset:
        return Subset(self.weight.detach() > 0.5)


def _share(on: Tensor, partition: Partition) -> Tensor:
    """Share of the neurons in the blocks of ``on`` (..., N), ``(...)`` float64."""
    if partition.uniform_size is not None:
        return _count(on).double() / partition.blocks
    return on.double() @ partition.shares(on.device)


def _count(on: Tensor) -> Tensor:
    """How many of ``on`` (..., N) are True, (...) int32: on a CPU ten times as fast as ``on.sum(-1)``."""
    return on.view(torch.uint8).sum(-1, dtype=torch.int32)


Choice = Prefix | Subset | Soft
