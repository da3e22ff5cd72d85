"""Codes as the GPU kernels read them: made once, when a model is loaded. Ships with every exported model.

A word of 32 bits holds fields of 32 / n adjacent weights, n bits each, the first weight in the lowest bits. The planes
that one look adds lie together, so that a look reads what is its own in whole cache lines. 32 adjacent weights are
*lane* w of a row, n words; word j of all lanes of a row is contiguous, and rows begin at multiples of 16 bytes. A lane
never has weights of two groups: its dot product is scaled once.

R rows (neurons), C columns, W lanes of a row (ceil(C / 32), up to a multiple of 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynaconv.kernels.codes import PIECE, Codes
from dynaconv.kernels.triton_support import power_of_two

LANE = 32
"""Adjacent weights of a lane."""


class Packed(NamedTuple):
    """A matrix of codes.

    Attributes:
        words: For each look, ``(R, n, W)`` int32 with n a power of two, at least the planes that it adds; ``None``
            where it adds none.
        scales: ``(R, W)`` int16, the scale of each lane in the low byte, its minimum in the high one.
        units: ``(R, 2)`` float32.
    """

    words: tuple[Tensor | None, ...]
    scales: Tensor
    units: Tensor


def lanes(columns: int) -> int:
    """W, for C ``columns``."""
    return -(-columns // (4 * LANE)) * 4


def can_pack(codes: Codes) -> bool:
    """Whether no lane has weights of two groups."""
    return codes.group % LANE == 0 or codes.group >= codes.columns


def pack(codes: Codes, reads: Sequence[int]) -> Packed:
    """The codes, for looks that have read so many planes each when they end: ``reads``, ascending.

    Args:
        codes: Whose groups :func:`can_pack`.
        reads: Planes read in all at the end of each look.
    """
    starts = (0, *reads[:-1])
    words = tuple(
        _words(codes, range(start, stop)) if stop > start else None for start, stop in zip(starts, reads, strict=True)
    )
    return Packed(words, _scales(codes), codes.units.float().contiguous())


def pack_rows(codes: Codes) -> Packed:
    """The codes, for whoever adds up whole rows: words in the order of the columns, ``(R, W n)`` int32."""
    width, count = lanes(codes.columns), power_of_two(codes.bits)
    words = _words(codes, range(codes.bits))
    rows = words.view(-1, count, width).transpose(1, 2).reshape(-1, width * count)
    return Packed((rows.contiguous(),), _scales(codes), codes.units.float().contiguous())


def _words(codes: Codes, planes: range) -> Tensor:
    """Words ``(R, n, W)`` of the fields that ``planes`` make."""
    rows, width, bits = codes.planes.shape[1], lanes(codes.columns), power_of_two(len(planes))
    device = codes.planes.device
    places = bits * torch.arange(LANE // bits, device=device)
    found = torch.empty(rows, bits, width, dtype=torch.int32, device=device)
    for piece in _pieces(rows, width * LANE):
        fields = torch.zeros(1, dtype=torch.int64, device=device)
        for plane in codes.planes[planes.start : planes.stop, piece]:
            fields = 2 * fields + _ones(plane, codes.columns, width)
        words = (fields.unflatten(1, (width, bits, -1)) << places).sum(-1)
        found[piece] = words.transpose(1, 2).to(torch.int32)  # the highest bit becomes the sign
    return found


def _ones(plane: Tensor, columns: int, width: int) -> Tensor:
    """Bits (R, 32 W) int64 of a plane (R, ceil(C / 8)); zeros beyond C."""
    shifts = torch.arange(7, -1, -1, device=plane.device)
    ones = ((plane[..., None].long() >> shifts) & 1).flatten(1)[:, :columns]
    return torch.nn.functional.pad(ones, (0, width * LANE - columns))


def _scales(codes: Codes) -> Tensor:
    lane = torch.arange(lanes(codes.columns), device=codes.scales.device)
    group = lane * LANE // codes.group
    inside = lane * LANE < codes.columns
    index = group.clamp(max=codes.scales.shape[1] - 1)
    both = codes.scales.int()[:, index] + (codes.minimums.int()[:, index] << 8)
    return (both * inside).to(torch.int16)


def _pieces(rows: int, columns: int) -> Iterator[slice]:
    """Rows, so many at a time that temporaries stay small."""
    step = max(1, PIECE // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))
