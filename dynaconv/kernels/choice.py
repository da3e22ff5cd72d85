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

    def exact_share(self, partition: Partition) -> Tensor:
        """Share of the neurons that each token uses with exact values, ``(...)`` float64: all that it uses."""
        return self.active_share(partition)

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
    """

    on: Tensor
    exact: Tensor | None = None

    def mask(self, blocks: int) -> Tensor:
        """Which blocks each token uses, ``(..., N)`` bool."""
        return self.on

    def width(self) -> Tensor:
        """How many blocks each token uses, ``(...)`` int64."""
        return self.on.sum(-1)

    def active_share(self, partition: Partition) -> Tensor:
        """Share of the neurons that each token uses, ``(...)`` float64."""
        return _share(self.on, partition)

    def exact_share(self, partition: Partition) -> Tensor:
        """Share of the neurons that each token uses with exact values, ``(...)`` float64."""
        return _share(self.on if self.exact is None else self.exact, partition)

    def rows(self) -> Subset:
        """The same with the tokens in one dimension."""
        exact = None if self.exact is None else self.exact.reshape(-1, self.exact.shape[-1])
        return Subset(self.on.reshape(-1, self.on.shape[-1]), exact)


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

    def exact_share(self, partition: Partition) -> Tensor:
        """Share of the neurons that each token uses with exact values, ``(...)`` float64: all that it uses."""
        return self.active_share(partition)

    def rows(self) -> Soft:
        """The same with the tokens in one dimension."""
        return Soft(self.weight.reshape(-1, self.weight.shape[-1]))

    def _used(self) -> Subset:
        return Subset(self.weight.detach() > 0.5)


def _share(on: Tensor, partition: Partition) -> Tensor:
    """Share of the neurons in the blocks of ``on`` (..., N), ``(...)`` float64."""
    if partition.uniform_size is not None:
        return on.sum(-1).double() / partition.blocks
    return on.double() @ partition.shares(on.device)


Choice = Prefix | Subset | Soft
