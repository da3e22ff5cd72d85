"""A weight matrix in a few bits, of which fewer can be read. Ships with every exported model.

Codes are stored bit plane by bit plane, the most significant first (as in any-precision quantisation, arXiv
2402.10517): the first p of b planes are the matrix in p bits, so a coarse reading costs no bytes of its own. Each group
of adjacent weights of a row has a scale and a minimum, of 8 bits each, relative to the largest of the row. They are
made from the weights by rounding to nearest, deterministically, and no calibration text is needed.

R rows (outputs), C columns (inputs), G groups of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32
"""Weights that share a scale and a minimum."""

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Ranges tried for each group, as shares of its full range; the one of the least squared error is taken."""

PIECE = 1 << 22
"""Weights that are encoded or decoded at once."""

_STEPS = 255  # of scales and minimums
_EIGHT = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0], dtype=torch.uint8)


@dataclass(frozen=True, eq=False)
class Codes:
    """A matrix (R, C), each weight about ``scale * code - minimum``.

    Attributes:
        columns: C.
        group: Weights a group; the last group of a row may hold fewer.
        planes: ``(b, R, ceil(C / 8))`` uint8, 8 weights a byte, the first weight in the highest bit.
        scales: ``(R, G)`` uint8, in steps of the row's first unit.
        minimums: ``(R, G)`` uint8, how far below 0 the range of the group begins, in steps of the row's second unit.
        units: ``(R, 2)`` bfloat16, whose range fits weights of any size.
    """

    columns: int
    group: int
    planes: Tensor
    scales: Tensor
    minimums: Tensor
    units: Tensor

    @property
    def bits(self) -> int:
        """Bits of a code, b."""
        return len(self.planes)

    @classmethod
    def of(cls, weight: Tensor, bits: int, group: int = GROUP) -> Codes:
        """Encodes ``weight`` (R, C).

        Args:
            weight: Finite weights, of any floating dtype.
            bits: b, 1 to 8.
            group: Weights that share a scale, from 1.
        """
        parts = [_encode(weight[rows].float(), bits, group) for rows in _pieces(weight.shape)]
        planes, *others = (torch.cat(part, dim=int(i == 0)) for i, part in enumerate(zip(*parts, strict=True)))
        return cls(weight.shape[1], group, planes, *others)

    def to(self, device: torch.device) -> Codes:
        """The same on ``device``."""
        parts = (self.planes, self.scales, self.minimums, self.units)
        return Codes(self.columns, self.group, *(part.to(device) for part in parts))

    def values(self, bits: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (R, C) as its first ``bits`` planes (from 1) say it: weights lie in the middle of what is open."""
        read = self.bits if bits is None else bits
        found = torch.empty(self.scales.shape[0], self.columns, dtype=dtype, device=self.scales.device)
        for rows in _pieces(found.shape):
            found[rows] = self._values(read, rows)
        return found

    def _values(self, read: int, rows: slice) -> Tensor:
        unread = self.bits - read
        code = torch.zeros(1, dtype=torch.float32, device=self.planes.device)
        for plane in self.planes[:read, rows]:
            code = 2 * code + unpacked(plane)
        code = code[:, : self.columns] * 2**unread + (2**unread - 1) / 2
        scale, minimum = (
            (steps[rows].float() * self.units[rows, i : i + 1].float()).repeat_interleave(self.group, 1)
            for i, steps in enumerate((self.scales, self.minimums))
        )
        return code * scale[:, : self.columns] - minimum[:, : self.columns]


def bytes_a_row(columns: int, bits: int, group: int = GROUP, *, further: bool = False) -> float:
    """Bytes read for one row of C ``columns`` in ``bits`` bits, its scales and minimums included.

    Args:
        columns: C.
        bits: Planes read.
        group: Weights a group.
        further: Whether the row's scales and minimums have been read already, with other planes.
    """
    planes = bits * -(-columns // 8)
    return float(planes if further else planes + 2 * -(-columns // group) + 4)


def _pieces(shape: torch.Size) -> Iterator[slice]:
    """Rows of a matrix of ``shape``, so many at a time that temporaries stay small."""
    step = max(1, PIECE // max(1, shape[1]))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def _encode(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Planes, scales, minimums and units of ``weight`` (R, C) float32."""
    rows, columns = weight.shape
    groups = -(-columns // group)
    padded = weight.new_zeros(rows, groups * group)  # zero lies within every range
    padded[:, :columns] = weight
    grouped, top = padded.unflatten(1, (groups, group)), 2**bits - 1
    low = -grouped.amin(-1).clamp(max=0)  # (R, G), how far the range goes below 0
    width = grouped.amax(-1).clamp(min=0) + low
    units = torch.stack([width.amax(1) / top, low.amax(1)], dim=1) / _STEPS
    units = units.clamp_min(torch.finfo(torch.bfloat16).smallest_normal).bfloat16()
    unit = units.float()
    best = None
    for shrink in SHRINKS:
        scales = (shrink * width / top / unit[:, :1]).round().clamp(1, _STEPS)
        minimums = (shrink * low / unit[:, 1:]).round().clamp(0, _STEPS)
        scale, minimum = (scales * unit[:, :1])[..., None], (minimums * unit[:, 1:])[..., None]
        code = ((grouped + minimum) / scale).round().clamp(0, top)
        error = (code * scale - minimum - grouped).square().sum(-1)
        found = (code, scales, minimums, error)
        if best is not None:
            better = error < best[-1]
            pairs = zip(found, best, strict=True)
            found = tuple(torch.where(better.view(*better.shape, *(1,) * (a.dim() - 2)), a, b) for a, b in pairs)  # type: ignore[assignment]
        best = found
    assert best is not None
    code, scales, minimums = best[0].flatten(1)[:, :columns].to(torch.uint8), best[1], best[2]
    planes = torch.stack([_packed((code >> (bits - 1 - plane)) & 1) for plane in range(bits)])
    return planes, scales.to(torch.uint8), minimums.to(torch.uint8), units


def _packed(ones: Tensor) -> Tensor:
    """Bytes (R, ceil(C / 8)) of ``ones`` (R, C), zeros and ones."""
    padded = torch.nn.functional.pad(ones, (0, -ones.shape[1] % 8)).unflatten(1, (-1, 8))
    shifted: Tensor = (padded << _EIGHT.to(ones.device)).sum(-1, dtype=torch.uint8)
    return shifted


def unpacked(plane: Tensor) -> Tensor:
    """The bits of a plane (R, bytes), zeros and ones, (R, 8 * bytes) uint8."""
    return ((plane[..., None] >> _EIGHT.to(plane.device)) & 1).flatten(1)
