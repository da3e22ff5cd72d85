"""How the decode kernels are launched: tiles, blocks and buffers. Ships with every exported model.

Nothing here depends on values, so that a call can be recorded in a CUDA graph, and whatever decides on the order of a
sum follows from the weights alone, never from the number of tokens: a token's result does not depend on its batch.

M tokens, D residual width, F neurons, S tiles of B neurons, Q groups of tokens, P splits of the tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynaconv.kernels.triton_support import TOKENS, power_of_two, row_stride

SPLITS = 64
"""Splits of the tiles in the down projection, each summed by programs of its own."""

COLUMNS = 256
"""Columns that a program reads of a row at once: 16 bytes of bf16 a thread."""


CODE_ROWS = 2
"""Rows of codes that a program reads at once. With another number, sums within a row would run in another order."""


@dataclass(frozen=True)
class Plan:
    """Sizes of one call.

    Attributes:
        tokens: Tokens of a program, a power of two.
        groups: Q.
        tile: B.
        tiles: S.
        splits: P.
        split: Neurons of a split, at most.
        exact_rows: Rows of weights that a program reads at once.
        code_rows: Rows of codes that it reads at once, of ``lanes`` lanes.
        lanes: A power of two.
        even: Whether :data:`COLUMNS` divides D.
    """

    tokens: int
    groups: int
    tile: int
    tiles: int
    splits: int
    split: int
    exact_rows: int
    code_rows: int
    lanes: int
    even: bool


def plan(count: int, columns: int, neurons: int, lanes: int) -> Plan:
    """Sizes for ``count`` tokens of ``columns`` features, ``neurons`` neurons and rows of ``lanes`` lanes of codes."""
    tokens = min(TOKENS, power_of_two(count))
    tile = 8 if neurons >= 8192 else 4
    tiles = -(-neurons // tile)
    split = -(-tiles * tile // SPLITS)
    return Plan(
        tokens=tokens,
        groups=-(-count // tokens),
        tile=tile,
        tiles=tiles,
        splits=-(-tiles * tile // split),
        split=split,
        exact_rows=1 if tokens == TOKENS else 2,
        code_rows=CODE_ROWS,
        lanes=min(128, power_of_two(lanes)),
        even=columns % COLUMNS == 0,
    )


def down_and_sum(
    sizes: Plan,
    rows: Tensor,
    given: Tensor,
    output: Tensor,
    bias: Tensor | None,
    base: Tensor | None = None,
    low: tuple[Tensor, Tensor, Tensor, int] | None = None,
    counts: Tensor | None = None,
    counted: Tensor | None = None,
) -> None:
    """Writes ``output`` (M, D): ``base``, ``bias``, and what neurons add.

    Args:
        sizes: Of the call.
        rows: Down, (F, D), a neuron a row.
        given: ``(1, M, S, B)`` float32, what each neuron adds of its row; ``(2, M, S, B)`` where ``low`` is given.
        output: Written.
        bias: Of down, (D,).
        base: What is added to that, (D,) or (M, D).
        low: Words, scales and units of down in few bits, and the bits of a field.
        counts: ``(M, S, 3)`` int32, summed into ``counted`` (M, 3).
        counted: Written.
    """
    from dynaconv.kernels.triton_down import down_kernel, low_down_kernel, sum_kernel

    count, columns = output.shape
    parts, blocks = sizes.splits * len(given), -(-columns // COLUMNS)
    partial = torch.empty(parts, count, columns, dtype=torch.float32, device=output.device)
    shared = {"TOKENS": sizes.tokens, "TILE": sizes.tile, "SLOTS": sizes.split, "STEP": 256 // sizes.tokens}
    listed = torch.empty(blocks, sizes.splits, sizes.groups, sizes.split, dtype=torch.int32, device=output.device)
    down_kernel[(blocks, sizes.splits, sizes.groups)](
        rows, given[0], listed, partial, count, columns, sizes.tiles,
        **shared, COLUMNS=COLUMNS, EVEN=sizes.even, num_warps=1,
    )  # fmt: skip
    if low is not None:
        words, scales, units, bits = low
        width = scales.shape[1]
        block = 64
        blocks = -(-width * bits // block)
        listed = torch.empty(blocks, sizes.splits, sizes.groups, sizes.split, dtype=torch.int32, device=output.device)
        low_down_kernel[(blocks, sizes.splits, sizes.groups)](
            words, scales, units, given[1], listed, partial[sizes.splits :], count, columns, width, sizes.tiles,
            **shared, BITS=bits, WORDS=block, num_warps=1,
        )  # fmt: skip
    places = max(3, -(-columns // 128))  # three programs of a token sum a kind of counts each
    sum_kernel[(places, count)](
        partial, base, row_stride(base), bias, output, counts, counted, count, columns,
        sizes.tiles, PARTS=parts, COLUMNS=128, STEP=256, num_warps=1,
    )  # fmt: skip
