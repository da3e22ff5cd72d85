"""How the neurons of an FFN are cut into blocks. Ships with every exported model.

F neurons, N blocks. Block n is the neurons [edges[n], edges[n + 1]).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the layout of a model is read without torch, which takes seconds to import
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Partition:
    """F neurons in N consecutive blocks: of one size, of which the last may be smaller, or cut at given positions.

    Make one with :meth:`equal` or :meth:`at`.

    Attributes:
        neurons: F.
        block_size: Neurons a block; 0 where the blocks are cut at ``positions``.
        positions: N + 1 ascending positions from 0 to F; empty where the blocks are of one size.
    """

    neurons: int
    block_size: int
    positions: tuple[int, ...] = ()

    @classmethod
    def equal(cls, neurons: int, block_size: int) -> Partition:
        """Blocks of ``block_size`` neurons; the last holds what is left.

        Raises:
            ValueError: ``block_size`` is not from 1 to ``neurons``.
        """
        if not 1 <= block_size <= neurons:
            raise ValueError(f"block_size is {block_size}; it must be from 1 to {neurons}, the neurons of the FFN")
        return cls(neurons, block_size)

    @classmethod
    def at(cls, positions: Sequence[int]) -> Partition:
        """Blocks between adjacent ``positions``; equal to :meth:`equal` where they are all of one size.

        Raises:
            ValueError: The positions do not ascend from 0.
        """
        if len(positions) < 2 or positions[0] != 0 or any(a >= b for a, b in pairwise(positions)):
            raise ValueError(f"block edges must ascend from 0; found: {list(positions)[:10]}")
        same = cls(positions[-1], positions[1])
        return same if same.edges == tuple(positions) else cls(positions[-1], 0, tuple(positions))

    @property
    def blocks(self) -> int:
        """N."""
        return -(-self.neurons // self.block_size) if self.block_size else len(self.positions) - 1

    @cached_property
    def edges(self) -> tuple[int, ...]:
        """N + 1 neuron positions."""
        if not self.block_size:
            return self.positions
        return (*range(0, self.neurons, self.block_size), self.neurons)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Neurons of each block."""
        return tuple(stop - start for start, stop in pairwise(self.edges))

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Ranges ``[first, stop)`` of adjacent blocks of one size, which cover all blocks."""
        sizes = self.sizes
        cuts = [0, *(n for n in range(1, len(sizes)) if sizes[n] != sizes[n - 1]), len(sizes)]
        return tuple(pairwise(cuts))

    @property
    def uniform_size(self) -> int | None:
        """Neurons of every block, ``None`` where blocks differ."""
        return self.block_size if self.block_size and self.neurons % self.block_size == 0 else None

    def spread(self, on: Tensor) -> Tensor:
        """What each neuron gets of the entries of its block: (..., N) to (..., F)."""
        if self.block_size == 1:
            return on
        if self.block_size:
            whole = on.unsqueeze(-1).expand(*on.shape, self.block_size).flatten(-2)
            return whole if whole.shape[-1] == self.neurons else whole[..., : self.neurons]
        import torch

        sizes = torch.tensor(self.sizes, device=on.device)
        return on.repeat_interleave(sizes, dim=-1, output_size=self.neurons)

    def shares(self, device: torch.device | None = None) -> Tensor:
        """Share of the neurons that each block has, (N,) float64; adds up to 1."""
        import torch

        return torch.tensor(self.sizes, dtype=torch.float64, device=device) / self.neurons

    def prefix_shares(self, device: torch.device | None = None) -> Tensor:
        """Share of the neurons in the first n blocks, n = 0..N, (N + 1,) float64."""
        import torch

        return torch.tensor(self.edges, dtype=torch.float64, device=device) / self.neurons

    def width_within(self, budget: float) -> int:
        """The most blocks, from the first on, that hold at most the share ``budget`` of the neurons."""
        return max(n for n, edge in enumerate(self.edges) if edge <= budget * self.neurons + 1e-9)

    def to_json(self) -> dict[str, Any]:
        """As ``dynaconv.json`` and ``statistics.json`` hold it."""
        if self.block_size:
            return {"neurons": self.neurons, "block_size": self.block_size}
        return {"edges": list(self.positions)}

    @classmethod
    def from_json(cls, content: Any) -> Partition:
        """The reverse of :meth:`to_json`.

        Raises:
            ValueError: It is neither form, or its numbers make no partition.
        """
        try:
            if "edges" in content:
                return cls.at([_whole(edge) for edge in content["edges"]])
            return cls.equal(_whole(content["neurons"]), _whole(content["block_size"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"a partition is {{neurons, block_size}} or {{edges}}; found: {content!r:.200}") from error


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(value)
    return value
