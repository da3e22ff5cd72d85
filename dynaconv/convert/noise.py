"""What copies of an input contribute: shares that differ, and still add up to what one input contributed.

After HyperCloning (arXiv 2409.12903) every input of a projection comes several times, and each copy's column is the old
one divided by the number of copies. Copies that begin alike receive the same gradients and stay alike, so something
must tell them apart. Noise that adds up to zero over the copies does, and changes no output; so does letting each copy
of an output read only its own copy of each input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_VALUES = 2**18  # noise of as many values is drawn at once: few seeds, and it stays in the cache

Columns = slice | Tensor


@dataclass(frozen=True)
class Copies:
    """Which positions of a dimension are copies of the same old position.

    Attributes:
        rank: How many copies come before each position (n,) int64.
        count: How many copies there are of each position's old one (n,) int64.
    """

    rank: Tensor
    count: Tensor

    @classmethod
    def of(cls, positions: Tensor) -> Copies:
        """From the old position (n,) int64 of each new one."""
        order = torch.argsort(positions, stable=True)
        ordered = positions[order]
        counts = torch.bincount(positions)
        first = counts.cumsum(0) - counts
        rank = torch.empty_like(positions)
        rank[order] = torch.arange(len(positions)) - first[ordered]
        return cls(rank, counts[positions])

    @property
    def most(self) -> int:
        """Copies of the position that has most."""
        return int(self.count.max())

    def at(self, rank: int, *, partner: bool = False) -> Tensor:
        """Ascending positions of the copies of ``rank``; with ``partner`` of those that the next rank is there too."""
        wanted = self.rank == rank
        return torch.nonzero(wanted & (self.count > rank + 1) if partner else wanted).flatten()


@dataclass(frozen=True)
class Pairs:
    """Columns that receive opposite noise.

    Attributes:
        runs: Pairs of columns, the first and the second of each.
        total: Number of pairs, K.
    """

    runs: tuple[tuple[Columns, Columns, int], ...]
    total: int

    @classmethod
    def of(cls, positions: Tensor) -> Pairs:
        """Copies 0 and 1 of each old position, 2 and 3, and so on; an odd last copy has no partner.

        Args:
            positions: Old column (n,) int64 of each new one.
        """
        copies, runs, total = Copies.of(positions), [], 0
        for rank in range(0, copies.most - 1, 2):
            first, second = copies.at(rank, partner=True), copies.at(rank + 1)
            second = second[torch.argsort(positions[second])][torch.argsort(torch.argsort(positions[first]))]
            runs.append((columns(first), columns(second), len(first)))
            total += len(first)
        return cls(tuple(runs), total)


def columns(index: Tensor) -> Columns:
    """Ascending positions as a slice where their steps are equal: a view instead of a copy."""
    steps = index.diff()
    if len(index) > 1 and bool((steps == steps[0]).all()) and steps[0] > 0:
        return slice(int(index[0]), int(index[-1]) + 1, int(steps[0]))
    return index


def add_noise(weight: Tensor, exact: Tensor, pairs: Pairs, *, snr_db: float, seed: int, name: str, start: int) -> None:
    """Adds Gaussian noise that adds up to zero over the copies of each input, in place.

    The second column of a pair is made from the rounded first one, so that the two add up to what they did as nearly as
    the type allows. Noise depends on the seed, the tensor and the row, and not on how the rows are cut into pieces.

    Args:
        weight: Rows ``start`` and following (M, n) of a projection, already divided among the copies.
        exact: The same before rounding, or ``weight`` itself.
        pairs: Which columns receive opposite noise.
        snr_db: Power of a row over the noise's, in decibels.
        seed: Of the run.
        name: Of the tensor.
        start: First row.
    """
    if not pairs.total:
        return
    wide = torch.promote_types(weight.dtype, torch.float32)
    size = weight.shape[1] ** 0.5 * 10 ** (snr_db / 20)
    for rows, noise in _noise_blocks(weight.shape[0], pairs.total, seed=seed, name=name, start=start):
        deviation = torch.linalg.vector_norm(exact[rows], dim=1, keepdim=True, dtype=wide) / size
        noise = noise.to(wide).mul_(deviation)
        done = 0
        for first, second, count in pairs.runs:
            value = exact[rows][:, first].to(wide, copy=True)
            moved = noise[:, done : done + count].add_(value).to(weight.dtype)
            weight[rows][:, first] = moved
            weight[rows][:, second] = value.mul_(2).sub_(moved).to(weight.dtype)
            done += count


def _noise_blocks(rows: int, width: int, *, seed: int, name: str, start: int) -> Iterator[tuple[slice, Tensor]]:
    """Standard normal noise (m, width) float32 for runs of ``rows`` rows from ``start`` on, block by block.

    A block is a fixed number of rows with a seed of its own, drawn whole even where a piece begins or ends within it.
    """
    height = max(1, BLOCK_VALUES // width)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    base = int.from_bytes(digest[:4], "big")  # torch's CPU generator reads 32 bits
    generator = torch.Generator()
    for block in range(start // height, -(-(start + rows) // height)):
        generator.manual_seed((base + block) % 2**32)
        noise = torch.empty(height, width).normal_(generator=generator)
        begin, end = max(block * height, start), min((block + 1) * height, start + rows)
        yield slice(begin - start, end - start), noise[begin - block * height : end - block * height]


def separate(weight: Tensor, rank: Tensor, copies: Copies) -> None:
    """Lets copy r of an output read copy r mod c of an input that comes c times, and no other, in place.

    Args:
        weight: Rows (M, n) of a projection, not divided among the copies.
        rank: Which copy of an output each row (M,) is.
        copies: Of the inputs.
    """
    for each in rank.unique().tolist():
        read = (each % copies.count == copies.rank).to(weight.dtype)
        rows = columns(torch.nonzero(rank == each).flatten())
        weight[rows] *= read
