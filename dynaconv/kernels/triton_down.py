"""Triton kernels of the down projection: a split of the neurons each, then the sum of the splits.

A program finds the neurons of its split that add something for one of its tokens, lists them, and adds one after the
other in their order; the splits are added in order too. So a token's result has the same bits whatever else is in the
batch, and nothing is atomic. Imported when the first kernel runs. Ships with every exported model. ``triton_look`` says
what the buffers are; P splits, C blocks of columns.
"""
# mypy: ignore-errors
# Kernels are read by Triton, not run as Python: types mean nothing in them.

from __future__ import annotations

import importlib

from dynaconv.kernels.triton_parts import append

triton = importlib.import_module("triton")  # no import statement: models must load where it is not installed
tl = importlib.import_module("triton.language")


@triton.jit
def list_used(given, token, token_ok, own, first, places, SLOTS: tl.constexpr, STEP: tl.constexpr):
    """Writes to ``own`` the places, of ``places`` of a token from ``first`` on, whose value is not 0; how many."""
    length = 0
    for begin in range(0, SLOTS, STEP):
        place = first + begin + tl.arange(0, STEP)
        inside = (begin + tl.arange(0, STEP) < SLOTS) & (place < places)
        mask = token_ok[:, None] & inside[None, :]
        value = tl.load(given + token[:, None] * places + place[None, :], mask=mask, other=0.0)
        some = tl.max((value != 0).to(tl.int32), 0) > 0
        position, length = append(some, length)
        tl.store(own + position, place, mask=some)
    return length


@triton.jit
def down_kernel(
    rows, given, lists, partial, M, D, tiles,
    TOKENS: tl.constexpr, TILE: tl.constexpr, SLOTS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """What the neurons of one split add to COLUMNS columns: ``partial`` (P, M, D) float32.

    Of the arguments:

        rows: Down, (F, D), a neuron a row.
        given: ``(M, S, B)`` float32, what each neuron adds of its row.
        lists: ``(C, P, Q, SLOTS)`` int32, where programs list neurons.
        SLOTS: Neurons of a split; STEP: of them at once.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    group = tl.program_id(2)
    token = group * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    token_ok = token < M
    places = tiles * TILE
    own = lists + ((tl.program_id(0) * tl.num_programs(1) + split) * tl.num_programs(2) + group) * SLOTS
    length = list_used(given, token, token_ok, own, split * SLOTS, places, SLOTS, STEP)
    tl.debug_barrier()  # what other threads of this program wrote is read from here on
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for index in tl.range(0, length, loop_unroll_factor=8):
        place = tl.load(own + index)
        neuron = (place // TILE + tiles * (place % TILE)).to(tl.int64)
        value = tl.load(given + token * places + place, mask=token_ok, other=0.0)
        source = rows + neuron * D + column[None, :]
        if EVEN:
            row = tl.load(source).to(tl.float32)
        else:
            row = tl.load(source, mask=(column < D)[None, :], other=0.0).to(tl.float32)
        # An infinite weight of a neuron that others use is no part of this token's result.
        total = tl.where(value[:, None] != 0, total + value[:, None] * row, total)
    target = partial + (split * M + token[:, None]) * D + column[None, :]
    tl.store(target, total, mask=token_ok[:, None] & (column < D)[None, :])


@triton.jit
def low_down_kernel(
    words, scales, units, given, lists, partial, M, D, W, tiles,
    BITS: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr, SLOTS: tl.constexpr, STEP: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """The same for neurons in low bits, whose rows are ``words`` (F, W BITS): WORDS words of 32 / BITS columns."""
    COUNT: tl.constexpr = 32 // BITS
    word_at = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    word_ok = word_at < W * BITS
    split = tl.program_id(1)
    group = tl.program_id(2)
    token = group * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    token_ok = token < M
    places = tiles * TILE
    own = lists + ((tl.program_id(0) * tl.num_programs(1) + split) * tl.num_programs(2) + group) * SLOTS
    length = list_used(given, token, token_ok, own, split * SLOTS, places, SLOTS, STEP)
    tl.debug_barrier()  # what other threads of this program wrote is read from here on
    field = tl.arange(0, COUNT)
    total = tl.zeros([TOKENS, WORDS, COUNT], tl.float32)
    for index in tl.range(0, length, loop_unroll_factor=4):
        place = tl.load(own + index)
        neuron = (place // TILE + tiles * (place % TILE)).to(tl.int64)
        value = tl.load(given + token * places + place, mask=token_ok, other=0.0)
        word = tl.load(words + neuron * (W * BITS) + word_at, mask=word_ok, other=0)
        both = tl.load(scales + neuron * W + word_at // BITS, mask=word_ok, other=0).to(tl.int32)
        scale = (both & 255).to(tl.float32) * tl.load(units + 2 * neuron)
        minimum = ((both >> 8) & 255).to(tl.float32) * tl.load(units + 2 * neuron + 1)
        code = ((word[:, None] >> (field * BITS)[None, :]) & ((1 << BITS) - 1)).to(tl.float32)
        row = code * scale[:, None] - minimum[:, None]
        total += value[:, None, None] * row[None, :, :]
    column = word_at[:, None] * COUNT + field[None, :]
    target = partial + (split * M + token[:, None, None]) * D + column[None, :, :]
    tl.store(target, total, mask=token_ok[:, None, None] & (column < D)[None, :, :])


@triton.jit
def sum_kernel(
    partial, base, base_stride, bias, output, counts, counted, M, D, tiles,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Output (M, D) of one token: its ``base`` (D,) or (M, D), ``bias`` (D,), and the sum of PARTS partial ones.

    The first three programs of a token add up a kind of its ``counts`` (M, S, 3) each, where there are any, to
    ``counted`` (M, 3).
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < D
    token = tl.program_id(1).to(tl.int64)
    total = tl.zeros([COLUMNS], tl.float32)
    for part in tl.range(0, PARTS, loop_unroll_factor=8):
        total += tl.load(partial + (part * M + token) * D + column, mask=inside, other=0.0)
    if base is not None:
        total += tl.load(base + token * base_stride + column, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + token * D + column, total.to(output.dtype.element_ty), mask=inside)
    kind = tl.program_id(0)
    if counts is not None:  # noqa: SIM102 - known when this is compiled; the next, when it runs
        if kind < 3:
            found = tl.zeros([STEP], tl.int32)
            for begin in range(0, tiles, STEP):
                tile = begin + tl.arange(0, STEP)
                found += tl.load(counts + (token * tiles + tile) * 3 + kind, mask=tile < tiles, other=0)
            tl.store(counted + token * 3 + kind, tl.sum(found, 0))
