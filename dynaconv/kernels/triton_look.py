"""Triton kernels that choose neurons by a few-bit copy, and compute those they choose, in one launch.

Neurons are dealt to tiles: tile t has the neurons t, t + S, t + 2 S and so on, so that neighbours, which are often used
together, are spread evenly. One program, a single warp, serves one tile and up to 4 tokens: it looks at all its
neurons, lists those that a token may use, looks at these again, lists those that are used, and computes their
activations. Lists are in the order of the neurons, whatever runs first; what a token gets does not depend on what
others add to a list.

Imported when the first kernel runs. Ships with every exported model. M tokens, D residual width, F neurons, W lanes of
a row of codes, S tiles of B neurons each, Q groups of tokens.

What programs write, all of it in places of their own:

* ``lists`` (3, Q, S, B) int32: neurons that are looked at twice, are exact, are in low bits, for some token, as their
  numbers within the tile; a program reads no more than it wrote;
* ``values`` (7, M, S, B) float32, at the positions of these lists: of the first, two parts of the product with the gate
  and the size by the first look; of the second, flags of tokens; of the third, flags and the products with gate and up;
* ``given`` (1 or 2, M, S, B) float32, neuron by neuron: what it adds of its column of down, and, where there are low
  bits, of that column's codes. 0: nothing;
* ``counts`` (M, S, 3) int32: neurons of each token that were looked at twice, are on, are exact.
"""
# mypy: ignore-errors
# Kernels are read by Triton, not run as Python: types mean nothing in them.

from __future__ import annotations

import importlib

from dynaconv.kernels.triton_parts import activate, append, blurred, first_dots, more_dots
from dynaconv.kernels.triton_values import exact_values, low_values

triton = importlib.import_module("triton")  # no import statement: models must load where it is not installed
tl = importlib.import_module("triton.language")


@triton.jit
def prepare_kernel(x, xt, norm, D, W, BLOCK: tl.constexpr):
    """Inputs (M, D) as ``lane_dots`` reads them, (M, 32, W) float32, and their Euclidean norms (M,)."""
    token = tl.program_id(0).to(tl.int64)
    inside = tl.arange(0, 32)
    squares = tl.zeros([BLOCK, 32], tl.float32)
    for first in range(0, W, BLOCK):
        lane = first + tl.arange(0, BLOCK)
        column = lane[:, None] * 32 + inside[None, :]
        part = tl.load(x + token * D + column, mask=column < D, other=0.0).to(tl.float32)
        squares += part * part
        place = xt + token * 32 * W + inside[None, :] * W + lane[:, None]
        tl.store(place, part, mask=(lane < W)[:, None] & (inside < 32)[None, :])
    tl.store(norm + token, tl.sqrt(tl.sum(tl.sum(squares, 1), 0)))


@triton.jit
def sketched_kernel(
    x, xt, norm, level, exact_level, rounding, mean, mean_stride,
    gate, up, gate_bias, up_bias, weight_stride,
    gate_words, gate_more, gate_rest, gate_scales, gate_units,
    up_words, up_more, up_rest, up_scales, up_units,
    looked, norms,
    lists, values, given, counts,
    reach, M, D, F, W, tiles,
    COARSE: tl.constexpr, READ: tl.constexpr, PLANES: tl.constexpr,
    BITS: tl.constexpr, MORE: tl.constexpr, REST: tl.constexpr,
    ACTIVATION: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    EXACT_ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Chooses and computes activations, for one tile and TOKENS tokens.

    Of the arguments:

        x: ``(M, D)``; ``xt`` and ``norm`` as :func:`prepare_kernel` writes them.
        level: ``(M,)`` float32; ``exact_level`` likewise, or None.
        rounding: ``(2,)`` float32, or None: what the activation is given is not blurred.
        mean: ``(F,)``, with ``mean_stride`` 0, or ``(M, F)``, or None.
        gate: ``(F, D)`` with rows ``weight_stride`` apart, or None; ``up`` likewise.
        gate_words: Fields of the first look, of BITS bits; ``gate_more`` of the second, MORE bits; ``gate_rest`` of
            low-bit values, REST bits. 0 bits: there are none.
        reach: What sizes of the first look are multiplied by.
        COARSE: Planes read by the first look; READ by the second, in all; PLANES: all there are.
        TILE: B. ROWS, LANES: of a step through codes. EXACT_ROWS, COLUMNS: of a step through weights.
        EVEN: Whether COLUMNS divides D.
    """
    tile = tl.program_id(0)
    group = tl.program_id(1)
    token = group * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    token_ok = token < M
    cell = (group * tiles + tile) * TILE
    cells = tl.num_programs(1) * tiles * TILE  # of one list
    home = (token * tiles + tile) * TILE
    slot = M * tiles * TILE  # values of one slot
    limit = tl.load(level + token, mask=token_ok, other=float("inf"))

    # First look: at all neurons, in the fewest bits.
    size = tl.load(norm + token, mask=token_ok, other=0.0)
    closer_count = tl.zeros([TOKENS], tl.int32)
    listed = 0
    for begin in range(0, TILE, ROWS):
        inner = begin + tl.arange(0, ROWS)
        neuron = tile + tiles * inner.to(tl.int64)
        there = neuron < F
        if gate is not None:
            base, middle = first_dots(
                gate_words, gate_scales, gate_units, neuron, there, xt, token, token_ok, W,
                COARSE, PLANES, BITS, LANES, TOKENS, ROWS,
            )  # fmt: skip
            bias = gate_bias
        else:
            base, middle = first_dots(
                up_words, up_scales, up_units, neuron, there, xt, token, token_ok, W,
                COARSE, PLANES, BITS, LANES, TOKENS, ROWS,
            )  # fmt: skip
            bias = up_bias
        dot = base + middle * (((1 << (PLANES - COARSE)) - 1) * 0.5)
        if bias is not None:
            dot += tl.load(bias + neuron, mask=there, other=0.0).to(tl.float32)[None, :]
        if rounding is not None:
            dot = blurred(dot, tl.load(rounding) * size[:, None])
        weight = tl.load(looked + neuron, mask=there, other=0.0)[None, :]
        if gate is not None:
            weight *= size[:, None]
        first = reach * tl.maximum(tl.abs(activate(dot, ACTIVATION)) * weight, 1e-30, tl.PropagateNan.ALL)
        closer = (first > limit[:, None]) & there[None, :] & token_ok[:, None]
        closer_count += tl.sum(closer.to(tl.int32), 1)
        some = tl.max(closer.to(tl.int32), 0) > 0
        position, listed = append(some, listed)
        tl.store(lists + cell + position, inner, mask=some)
        own = given + home[:, None] + inner[None, :]
        tl.store(own, tl.zeros([TOKENS, ROWS], tl.float32), mask=token_ok[:, None] & (inner < TILE)[None, :])
        if exact_level is not None:
            tl.store(own + slot, tl.zeros([TOKENS, ROWS], tl.float32), mask=token_ok[:, None] & (inner < TILE)[None, :])
        place = values + home[:, None] + position[None, :]
        keep = some[None, :] & token_ok[:, None]
        tl.store(place, base, mask=keep)  # slots 0, 1 and 2
        tl.store(place + slot, middle, mask=keep)
        tl.store(place + 2 * slot, tl.where(closer, first, 0.0), mask=keep)
    tl.debug_barrier()  # what other threads of this program wrote is read from here on

    # Second look: at those listed, in a few more bits.
    on_count = tl.zeros([TOKENS], tl.int32)
    exact_count = tl.zeros([TOKENS], tl.int32)
    exact_listed = 0
    low_listed = 0
    for begin in range(0, listed, ROWS):
        position = begin + tl.arange(0, ROWS)
        there = position < listed
        inner = tl.load(lists + cell + position, mask=there, other=0)
        neuron = tile + tiles * inner.to(tl.int64)
        place = values + home[:, None] + position[None, :]
        keep = there[None, :] & token_ok[:, None]
        base = tl.load(place, mask=keep, other=0.0)
        middle = tl.load(place + slot, mask=keep, other=0.0)
        first = tl.load(place + 2 * slot, mask=keep, other=0.0)
        HALF: tl.constexpr = ((1 << (PLANES - READ)) - 1) * 0.5
        if gate is not None:
            gate_dot = base
            if MORE > 0:
                gate_dot += more_dots(
                    gate_more, gate_scales, gate_units, neuron, there, xt, token, token_ok, W,
                    1 << (PLANES - READ), MORE, LANES, TOKENS, ROWS,
                )  # fmt: skip
            gated = gate_dot + middle * HALF
            if gate_bias is not None:
                gated += tl.load(gate_bias + neuron, mask=there, other=0.0).to(tl.float32)[None, :]
            up_dot, middle = first_dots(
                up_words, up_scales, up_units, neuron, there, xt, token, token_ok, W,
                COARSE, PLANES, BITS, LANES, TOKENS, ROWS,
            )  # fmt: skip
        else:
            up_dot = base
        if MORE > 0:
            up_dot += more_dots(
                up_more, up_scales, up_units, neuron, there, xt, token, token_ok, W,
                1 << (PLANES - READ), MORE, LANES, TOKENS, ROWS,
            )  # fmt: skip
        result = up_dot + middle * HALF
        if up_bias is not None:
            result += tl.load(up_bias + neuron, mask=there, other=0.0).to(tl.float32)[None, :]
        if gate is None:
            gated = result
        if rounding is not None:
            gated = blurred(gated, tl.load(rounding + 1) * size[:, None])
        gated = activate(gated, ACTIVATION)
        if gate is not None:
            gated *= result
        result = gated
        second = tl.abs(result) * tl.load(norms + neuron, mask=there, other=0.0)[None, :]
        second = tl.maximum(second, 1e-30, tl.PropagateNan.ALL)
        on = (first > limit[:, None]) & (second > limit[:, None]) & keep
        on_count += tl.sum(on.to(tl.int32), 1)
        exact = on
        if exact_level is not None:
            high = tl.load(exact_level + token, mask=token_ok, other=float("inf"))
            exact = on & (tl.minimum(first, second) > high[:, None])
            low = (on.to(tl.int32) - exact.to(tl.int32)) > 0
            some = tl.max(low.to(tl.int32), 0) > 0
            position, low_listed = append(some, low_listed)
            tl.store(lists + 2 * cells + cell + position, inner, mask=some)
            place = values + home[:, None] + position[None, :]
            keep = some[None, :] & token_ok[:, None]
            tl.store(place + 4 * slot, low.to(tl.float32), mask=keep)
            if gate is not None:
                tl.store(place + 5 * slot, gate_dot, mask=keep)
            tl.store(place + 6 * slot, up_dot, mask=keep)
        exact_count += tl.sum(exact.to(tl.int32), 1)
        some = tl.max(exact.to(tl.int32), 0) > 0
        position, exact_listed = append(some, exact_listed)
        tl.store(lists + cells + cell + position, inner, mask=some)
        place = values + home[:, None] + position[None, :]
        tl.store(place + 3 * slot, exact.to(tl.float32), mask=some[None, :] & token_ok[:, None])
    count_place = counts + (token * tiles + tile) * 3
    tl.store(count_place, closer_count, mask=token_ok)
    tl.store(count_place + 1, on_count, mask=token_ok)
    tl.store(count_place + 2, exact_count, mask=token_ok)
    tl.debug_barrier()

    exact_values(
        x, gate, up, gate_bias, up_bias, weight_stride, mean, mean_stride,
        lists + cells + cell, exact_listed, values + 3 * slot, given, home, token, token_ok, tile, tiles, D,
        ACTIVATION, TOKENS, EXACT_ROWS, COLUMNS, EVEN,
    )  # fmt: skip
    if exact_level is not None:
        low_values(
            xt, gate is not None, gate_bias, up_bias, gate_rest, gate_scales, gate_units, up_rest, up_scales, up_units,
            mean, mean_stride, lists + 2 * cells + cell, low_listed, values + 4 * slot, slot, given + slot,
            home, token, token_ok, tile, tiles, W, REST, ACTIVATION, TOKENS, ROWS, LANES,
        )  # fmt: skip
