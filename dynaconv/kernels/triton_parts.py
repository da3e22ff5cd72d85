"""What several Triton kernels are made of. Imported when the first kernel runs. Ships with every exported model.

Arguments in capitals are known when a kernel is compiled, and so is whether a pointer is None.
"""
# mypy: ignore-errors
# Kernels are read by Triton, not run as Python: types mean nothing in them.

from __future__ import annotations

import importlib

triton = importlib.import_module("triton")  # no import statement: models must load where it is not installed
tl = importlib.import_module("triton.language")


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The nonlinearity of float32 values."""
    if ACTIVATION == 0:
        y = x / (1 + tl.exp(-x))
    elif ACTIVATION == 1:
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == 2:
        # (1 + tanh z) / 2 is the sigmoid of 2 z
        y = x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        y = tl.where(x > 0, x, x * 0)  # NaN stays NaN
    return y


@triton.jit
def blurred(seen, width):
    """``(seen + sqrt(seen**2 + width**2)) / 2``, computed so that nothing cancels."""
    square = width * width
    both = tl.maximum(tl.abs(seen) + tl.sqrt(seen * seen + square), 1e-30, tl.PropagateNan.ALL)
    return tl.maximum(seen, 0.0, tl.PropagateNan.ALL) + square / both / 2


@triton.jit
def append(taken, count):
    """Positions in a list of what is ``taken`` (R,), behind the ``count`` that it has, and how many it has then."""
    ones = taken.to(tl.int32)
    return count + tl.cumsum(ones, 0) - ones, count + tl.sum(ones, 0)


@triton.jit
def lane_dots(words, rows, rows_ok, xt, token, token_ok, lane, lane_ok, W, BITS: tl.constexpr):
    """Dot products of the fields of each lane with inputs, and the sums of these inputs.

    Both are float32, (T, R, L) and (T, 1, L), for T tokens, R rows and L lanes. Loads have three dimensions, of which
    one or two are 1, so that all of them, and the products, lie alike in the threads of the one warp that a program is.

    A field is put into the mantissa of a number from 1 to 2, which takes a shift, one logical operation and no
    conversion; the product is then too large by the sum of the inputs, which is taken off in the end.

    Args:
        words: ``(., BITS, W)`` int32.
        rows: int64.
        rows_ok: Rows to be read.
        xt: Inputs ``(., 32, W)`` float32, of which [i, w] belongs to column 32 w + i.
        token: int64.
        token_ok: Tokens there are.
        lane: Their numbers.
        lane_ok: Those below ``W``.
        W: Lanes of a row.
        BITS: Bits of a field.
    """
    COUNT: tl.constexpr = 32 // BITS
    total = tl.zeros([token.shape[0], rows.shape[0], lane.shape[0]], tl.float32)
    plain = tl.zeros([token.shape[0], 1, lane.shape[0]], tl.float32)
    row_place = words + rows[None, :, None] * (BITS * W)
    row_mask = rows_ok[None, :, None] & lane_ok[None, None, :]
    token_place = xt + token[:, None, None] * (32 * W)
    token_mask = token_ok[:, None, None] & lane_ok[None, None, :]
    read = ()
    for j in tl.static_range(BITS):  # all loads are under way before the first word is needed
        read = read + (tl.load(row_place + (j * W + lane)[None, None, :], mask=row_mask, other=0),)  # noqa: RUF005
    for j in tl.static_range(BITS):
        word = read[j]
        for i in tl.range(0, COUNT, loop_unroll_factor=4):  # unrolled altogether, it takes minutes to compile
            field = (word >> (i * BITS)) << (23 - BITS)
            field = (field & (((1 << BITS) - 1) << (23 - BITS))) | 0x3F800000
            value = field.to(tl.float32, bitcast=True)
            x = tl.load(token_place + ((j * COUNT + i) * W + lane)[None, None, :], mask=token_mask, other=0.0)
            total += x * value
            plain += x
    return (total - plain) * (1 << BITS), plain


@triton.jit
def lane_scales(scales, units, rows, rows_ok, lane, lane_ok, W):
    """Scales and minimums of lanes, (1, R, L) float32 each."""
    mask = rows_ok[None, :, None] & lane_ok[None, None, :]
    both = tl.load(scales + rows[None, :, None] * W + lane[None, None, :], mask=mask, other=0).to(tl.int32)
    unit = units + rows[None, :, None] * 2
    scale = (both & 255).to(tl.float32) * tl.load(unit, mask=rows_ok[None, :, None], other=0.0)
    return scale, ((both >> 8) & 255).to(tl.float32) * tl.load(unit + 1, mask=rows_ok[None, :, None], other=0.0)


@triton.jit
def first_dots(
    words, scales, units, rows, rows_ok, xt, token, token_ok, W,
    COARSE: tl.constexpr, PLANES: tl.constexpr, BITS: tl.constexpr,
    LANES: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Products of rows with inputs, (TOKENS, ROWS) float32, as the first COARSE of PLANES planes say them.

    Returns:
        What these planes give where all others are 0, and what is to be added for each half of a step of the last
        plane that the others may hold.
    """
    base = tl.zeros([TOKENS, ROWS], tl.float32)
    middle = tl.zeros([TOKENS, ROWS], tl.float32)
    for begin in range(0, W, LANES):
        lane = begin + tl.arange(0, LANES)
        lane_ok = lane < W
        dots, plain = lane_dots(words, rows, rows_ok, xt, token, token_ok, lane, lane_ok, W, BITS)
        scale, minimum = lane_scales(scales, units, rows, rows_ok, lane, lane_ok, W)
        base += tl.sum(dots * (scale * (1 << (PLANES - COARSE))) - plain * minimum, 2)
        middle += tl.sum(plain * scale, 2)
    return base, middle


@triton.jit
def more_dots(
    words, scales, units, rows, rows_ok, xt, token, token_ok, W,
    STEP: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What further planes, of which the last counts STEP, add to products of rows with inputs, (TOKENS, ROWS)."""
    added = tl.zeros([TOKENS, ROWS], tl.float32)
    for begin in range(0, W, LANES):
        lane = begin + tl.arange(0, LANES)
        lane_ok = lane < W
        dots, _ = lane_dots(words, rows, rows_ok, xt, token, token_ok, lane, lane_ok, W, BITS)
        scale, _ = lane_scales(scales, units, rows, rows_ok, lane, lane_ok, W)
        added += tl.sum(dots * (scale * STEP), 2)
    return added
