"""How the decode kernels are launched: tiles, blocks and buffers. Ships with every exported model.

Nothing here depends on values, so that a call can be recorded in a CUDA graph, and whatever decides on the order of a
sum follows from the weights alone, never from the number of tokens: a token's result does not depend on its batch.

M tokens, D residual width, F neurons, S tiles of B neurons, Q groups of tokens, P splits of the tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynaconv.kernels.triton_support import TOKENS, power_of_two

SPLITS = 64
"""Splits of the tiles in the down projection, each summed by programs of its own."""


@dataclass(frozen=True)
class Plan:
    """Sizes of one call.

    Attributes:
        tokens: Tokens of a program, a power of two.
        groups: Q.
        tile: B.
        tiles: S.
        splits: P.
        tiles_per_split: S / P, rounded up.
        exact_rows: Rows of weights that a program reads at once, of ``columns`` columns.
        columns: A power of two.
        code_rows: Rows of codes that a program reads at once, of ``lanes`` lanes.
        lanes: A power of two.
        down_columns: Columns of the output that a program sums.
        even: Whether ``columns`` and ``down_columns`` divide D.
    """

    tokens: int
    groups: int
    tile: int
    tiles: int
    splits: int
    tiles_per_split: int
    exact_rows: int
    columns: int
    code_rows: int
    lanes: int
    down_columns: int
    even: bool

    @property
    def down_warps(self) -> int:
        """Warps of a program of the down projection: each lane loads 8 values of a row."""
        return max(1, self.down_columns // 256)


def plan(count: int, columns: int, neurons: int, lanes: int) -> Plan:
    """Sizes for ``count`` tokens of ``columns`` features, ``neurons`` neurons and rows of ``lanes`` lanes of codes."""
    tokens = min(TOKENS, power_of_two(count))
    tile = 32 if neurons >= 8192 else 16
    tiles = -(-neurons // tile)
    step = -(-tiles // min(SPLITS, tiles))
    down_columns = 1024 if columns >= 2048 else 256
    return Plan(
        tokens=tokens,
        groups=-(-count // tokens),
        tile=tile,
        tiles=tiles,
        splits=-(-tiles // step),
        tiles_per_split=step,
        exact_rows=8 if tokens == 1 else 4,
        columns=256,
        code_rows=min(tile, 32 // tokens),
        lanes=min(128, power_of_two(lanes)),
        down_columns=down_columns,
        even=columns % down_columns == 0,
    )


def down_and_sum(
    sizes: Plan,
    rows: Tensor,
    pieces: list[tuple[Tensor, Tensor, Tensor]],
    output: Tensor,
    base: Tensor | None,
    low: tuple[Tensor, Tensor, Tensor, int, int] | None = None,
    counts: Tensor | None = None,
    counted: Tensor | None = None,
) -> None:
    """Writes ``output`` (M, D): ``base``, and what listed neurons add.

    Args:
        sizes: Of the call.
        rows: Down, (F, D), a neuron a row.
        pieces: Lists (Q, S, B), lengths (Q, S) and values (M, S, B) each. Where ``low`` is given, the second of them
            is summed over its rows and, with the last slot of values, over those of ``rows``.
        output: Written.
        base: The output with all neurons off, (D,) or (M, D) float32.
        low: Words, scales, units, bits of a field and planes of down in few bits.
        counts: ``(M, S, 3)`` int32, summed into ``counted`` (M, 3).
        counted: Written.
    """
    from dynaconv.kernels.triton_down import down_kernel, low_down_kernel, sum_kernel

    count, columns = output.shape
    parts = len(pieces)
    partial = torch.empty(parts * sizes.splits, count, columns, dtype=torch.float32, device=output.device)
    shared = (sizes.tiles, sizes.splits, sizes.tiles_per_split)
    for index, (lists, lengths, values) in enumerate(pieces):
        own = partial[index * sizes.splits : (index + 1) * sizes.splits]
        if low is not None and index == 1:
            words, scales, units, bits, planes = low
            width = scales.shape[1]
            block = min(128, power_of_two(width * bits))
            low_down_kernel[(-(-width * bits // block), sizes.splits, sizes.groups)](
                words, scales, units, lists, lengths, values, own, count, columns, width, *shared,
                BITS=bits, PLANES=planes, TOKENS=sizes.tokens, TILE=sizes.tile, WORDS=block, num_warps=4,
            )  # fmt: skip
            continue
        down_kernel[(-(-columns // sizes.down_columns), sizes.splits, sizes.groups)](
            rows, lists, lengths, values, own, count, columns, *shared,
            TOKENS=sizes.tokens, TILE=sizes.tile, COLUMNS=sizes.down_columns, EVEN=sizes.even,
            num_warps=sizes.down_warps,
        )  # fmt: skip
    sum_kernel[(-(-columns // 128), count)](
        partial, base, columns if base is not None and base.dim() == 2 else 0, output, counts, counted, count, columns,
        sizes.tiles, PARTS=parts * sizes.splits, COLUMNS=128, TILES=power_of_two(sizes.tiles), num_warps=1,
    )  # fmt: skip
