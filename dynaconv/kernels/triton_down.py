"""Triton kernels of the down projection: listed rows, a split of the tiles each, then the sum of the splits.

Every split adds neuron after neuron in the order of its lists, and the splits are added in order: a token's result has
the same bits whatever else is in the batch. Imported when the first kernel runs. Ships with every exported model.
``triton_look`` says what the buffers are; P splits.
"""
# mypy: ignore-errors
# Kernels are read by Triton, not run as Python: types mean nothing in them.

from __future__ import annotations

import importlib

triton = importlib.import_module("triton")  # no import statement: models must load where it is not installed
tl = importlib.import_module("triton.language")


@triton.jit
def add_rows(rows, D, listed, length, values, token_ok, column, column_ok, total, EVEN: tl.constexpr):
    """``total`` (T, C) and ``values`` of each token times the rows ``listed``, columns (C,)."""
    for place in tl.range(0, length, loop_unroll_factor=4):
        neuron = tl.load(listed + place).to(tl.int64)
        value = tl.load(values + place, mask=token_ok, other=0.0)
        if EVEN:
            row = tl.load(rows + neuron * D + column).to(tl.float32)
        else:
            row = tl.load(rows + neuron * D + column, mask=column_ok, other=0.0).to(tl.float32)
        # An infinite weight of a neuron that others use is no part of this token's result.
        total = tl.where(value[:, None] != 0, total + value[:, None] * row[None, :], total)
    return total


@triton.jit
def down_kernel(
    rows, lists, lengths, values, partial, M, D, tiles, splits, tiles_per_split,
    TOKENS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """What the exact neurons of one split add to COLUMNS columns: ``partial`` (P, M, D) float32.

    Args:
        rows: Down, (F, D), a neuron a row.
        lists: ``(Q, S, B)``, ``lengths`` ``(Q, S)`` and ``values`` ``(M, S, B)`` of one kind of neurons.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    group = tl.program_id(2)
    token = group * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    token_ok = token < M
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tiles)):
        cell = group * tiles + tile
        home = values + (token * tiles + tile) * TILE
        length = tl.load(lengths + cell)
        total = add_rows(rows, D, lists + cell * TILE, length, home, token_ok, column, column < D, total, EVEN)
    place = partial + (split * M + token[:, None]) * D + column[None, :]
    tl.store(place, total, mask=token_ok[:, None] & (column < D)[None, :])


@triton.jit
def low_down_kernel(
    words, scales, units, lists, lengths, values, partial, M, D, W, tiles, splits, tiles_per_split,
    BITS: tl.constexpr, PLANES: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The same for neurons in low bits, whose rows are ``words`` (F, W BITS): WORDS words of 32 / BITS columns."""
    COUNT: tl.constexpr = 32 // BITS
    word_at = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    word_ok = word_at < W * BITS
    split = tl.program_id(1)
    group = tl.program_id(2)
    token = group * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    token_ok = token < M
    field = tl.arange(0, COUNT)
    total = tl.zeros([TOKENS, WORDS, COUNT], tl.float32)
    for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tiles)):
        cell = group * tiles + tile
        length = tl.load(lengths + cell)
        home = values + (token * tiles + tile) * TILE
        for place in tl.range(0, length, loop_unroll_factor=4):
            neuron = tl.load(lists + cell * TILE + place).to(tl.int64)
            value = tl.load(home + place, mask=token_ok, other=0.0)
            word = tl.load(words + neuron * (W * BITS) + word_at, mask=word_ok, other=0)
            both = tl.load(scales + neuron * W + word_at // BITS, mask=word_ok, other=0).to(tl.int32)
            scale = (both & 255).to(tl.float32) * tl.load(units + 2 * neuron)
            minimum = ((both >> 8) & 255).to(tl.float32) * tl.load(units + 2 * neuron + 1)
            code = ((word[:, None] >> (field * BITS)[None, :]) & ((1 << BITS) - 1)).to(tl.float32)
            row = code * scale[:, None] - minimum[:, None]
            total += value[:, None, None] * row[None, :, :]
    column = word_at[:, None] * COUNT + field[None, :]
    place = partial + (split * M + token[:, None, None]) * D + column[None, :, :]
    tl.store(place, total, mask=token_ok[:, None, None] & (column < D)[None, :, :])


@triton.jit
def sum_kernel(
    partial, all_off, all_off_stride, output, counts, counted, M, D, tiles,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Output (M, D) of one token: what it is with all neurons off, and the sum of PARTS partial ones.

    The first program of a token also adds up its ``counts`` (M, S, 3), where there are any, to ``counted`` (M, 3).
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < D
    token = tl.program_id(1).to(tl.int64)
    total = tl.zeros([COLUMNS], tl.float32)
    for part in tl.range(0, PARTS, loop_unroll_factor=8):
        total += tl.load(partial + (part * M + token) * D + column, mask=inside, other=0.0)
    if all_off is not None:
        total += tl.load(all_off + token * all_off_stride + column, mask=inside, other=0.0)
    tl.store(output + token * D + column, total.to(output.dtype.element_ty), mask=inside)
    if counts is not None:
        if tl.program_id(0) == 0:
            tile = tl.arange(0, TILES)
            for kind in tl.static_range(3):
                some = tl.load(counts + (token * tiles + tile) * 3 + kind, mask=tile < tiles, other=0)
                tl.store(counted + token * 3 + kind, tl.sum(some, 0))
