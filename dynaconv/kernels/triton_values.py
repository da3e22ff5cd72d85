"""What listed neurons give, and the sum of what they add to the output: the half of the Triton kernels that reads rows.

Sums over neurons run in the order of lists, one neuron after the other, so that what a token does not use changes no
bit of its result. Tiles are dealt to a fixed number of splits, whose sums are added in order. Nothing is atomic.

Imported when the first kernel runs. Ships with every exported model. ``triton_look`` says what the buffers are.
"""
# mypy: ignore-errors
# Kernels are read by Triton, not run as Python: types mean nothing in them.

from __future__ import annotations

import importlib

from dynaconv.kernels.triton_parts import activate, append, more_dots

triton = importlib.import_module("triton")  # no import statement: models must load where it is not installed
tl = importlib.import_module("triton.language")


@triton.jit
def load_mean(mean, stride, neuron, there, token, token_ok):
    """Means of neurons (R,) for tokens (T,), (T, R) float32."""
    keep = there[None, :] & token_ok[:, None]
    return tl.load(mean + token[:, None] * stride + neuron[None, :], mask=keep, other=0.0).to(tl.float32)


@triton.jit
def exact_values(
    x, gate, up, gate_bias, up_bias, weight_stride, mean, mean_stride,
    listed, length, flags, found, home, token, token_ok, D,
    ACTIVATION: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Activations of the ``length`` neurons ``listed``, less their mean; 0 for tokens without a flag.

    Flags are read, and values are written (``found``), at the positions of the list behind ``home`` of each token.
    """
    for begin in range(0, length, ROWS):
        position = begin + tl.arange(0, ROWS)
        there = position < length
        neuron = tl.load(listed + position, mask=there, other=0).to(tl.int64)
        rows = neuron[:, None] * weight_stride
        up_sum = tl.zeros([TOKENS, ROWS, COLUMNS], tl.float32)
        gate_sum = tl.zeros([TOKENS, ROWS, COLUMNS], tl.float32)
        for start in range(0, D, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            if EVEN:
                row_mask = there[:, None]
                token_mask = token_ok[:, None]
            else:
                row_mask = there[:, None] & (column < D)[None, :]
                token_mask = token_ok[:, None] & (column < D)[None, :]
            weight = tl.load(up + rows + column[None, :], mask=row_mask, other=0.0).to(tl.float32)
            if gate is not None:
                other = tl.load(gate + rows + column[None, :], mask=row_mask, other=0.0).to(tl.float32)
            part = tl.load(x + token[:, None] * D + column[None, :], mask=token_mask, other=0.0).to(tl.float32)
            up_sum += part[:, None, :] * weight[None, :, :]
            if gate is not None:
                gate_sum += part[:, None, :] * other[None, :, :]
        given = tl.sum(up_sum, 2)
        if up_bias is not None:
            given += tl.load(up_bias + neuron, mask=there, other=0.0).to(tl.float32)[None, :]
        if gate is not None:
            gated = tl.sum(gate_sum, 2)
            if gate_bias is not None:
                gated += tl.load(gate_bias + neuron, mask=there, other=0.0).to(tl.float32)[None, :]
            given *= activate(gated, ACTIVATION)
        else:
            given = activate(given, ACTIVATION)
        if mean is not None:
            given -= load_mean(mean, mean_stride, neuron, there, token, token_ok)
        place = home[:, None] + position[None, :]
        keep = there[None, :] & token_ok[:, None]
        flag = tl.load(flags + place, mask=keep, other=0.0)
        tl.store(found + place, tl.where(flag > 0, given, 0.0), mask=keep)


@triton.jit
def low_values(
    xt, GATED: tl.constexpr, gate_bias, up_bias, gate_words, gate_scales, gate_units, up_words, up_scales, up_units,
    mean, mean_stride, listed, length, values, slot, home, token, token_ok, W,
    BITS: tl.constexpr, ACTIVATION: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Activations of the ``length`` neurons ``listed`` by their codes, of which further planes are read.

    ``values`` has four slots: flags, the products with gate and up so far, and the means, negative. Activations take
    the place of the products with up, and the means' slot is written where there are means.
    """
    for begin in range(0, length, ROWS):
        position = begin + tl.arange(0, ROWS)
        there = position < length
        neuron = tl.load(listed + position, mask=there, other=0).to(tl.int64)
        place = values + home[:, None] + position[None, :]
        keep = there[None, :] & token_ok[:, None]
        given = tl.load(place + 2 * slot, mask=keep, other=0.0)
        if BITS > 0:
            given += more_dots(
                up_words, up_scales, up_units, neuron, there, xt, token, token_ok, W, 1, BITS, LANES, TOKENS, ROWS
            )
        if up_bias is not None:
            given += tl.load(up_bias + neuron, mask=there, other=0.0).to(tl.float32)[None, :]
        if GATED:
            gated = tl.load(place + slot, mask=keep, other=0.0)
            if BITS > 0:
                gated += more_dots(
                    gate_words, gate_scales, gate_units, neuron, there, xt, token, token_ok, W,
                    1, BITS, LANES, TOKENS, ROWS,
                )  # fmt: skip
            if gate_bias is not None:
                gated += tl.load(gate_bias + neuron, mask=there, other=0.0).to(tl.float32)[None, :]
            given *= activate(gated, ACTIVATION)
        else:
            given = activate(given, ACTIVATION)
        used = tl.load(place, mask=keep, other=0.0) > 0
        tl.store(place + 3 * slot, tl.where(used, given, 0.0), mask=keep)
        if mean is not None:
            given = -load_mean(mean, mean_stride, neuron, there, token, token_ok)
            tl.store(place + 4 * slot, tl.where(used, given, 0.0), mask=keep)


@triton.jit
def chosen_kernel(
    x, on, on_stride, block_of, stops, gate, up, gate_bias, up_bias, weight_stride, mean, mean_stride,
    lists, values, lengths, M, D, F, tiles,
    ACTIVATION: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Lists the neurons of one tile that some of TOKENS tokens use, and computes them.

    Tokens use the blocks that are ``on`` (M, N) bool, neuron f being in block ``block_of[f]``, f where that is None;
    or, where ``on`` is None, the first ``stops[m]`` neurons. ``lists`` (Q, S, B), ``values`` (2, M, S, B) and
    ``lengths`` (Q, S) are as in ``triton_look``, with flags and values.
    """
    tile = tl.program_id(0)
    group = tl.program_id(1)
    token = group * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    token_ok = token < M
    cell = (group * tiles + tile) * TILE
    home = (token * tiles + tile) * TILE
    slot = M * tiles * TILE  # values of one slot
    neuron = tile + tiles * tl.arange(0, TILE)
    there = neuron < F
    keep = there[None, :] & token_ok[:, None]
    if on is None:
        stop = tl.load(stops + token, mask=token_ok, other=0)
        used = (neuron[None, :] < stop[:, None]) & keep
    else:
        block = neuron
        if block_of is not None:
            block = tl.load(block_of + neuron, mask=there, other=0)
        used = tl.load(on + token[:, None] * on_stride + block[None, :], mask=keep, other=0) != 0
    some = tl.max(used.to(tl.int32), 0) > 0
    position, length = append(some, 0)
    tl.store(lists + cell + position, neuron, mask=some)
    place = home[:, None] + position[None, :]
    tl.store(values + place, used.to(tl.float32), mask=some[None, :] & token_ok[:, None])
    tl.store(lengths + group * tiles + tile, length)
    tl.debug_barrier()
    exact_values(
        x, gate, up, gate_bias, up_bias, weight_stride, mean, mean_stride,
        lists + cell, length, values, values + slot, home, token, token_ok, D,
        ACTIVATION, TOKENS, ROWS, COLUMNS, EVEN,
    )  # fmt: skip
