"""Activations of listed neurons in Triton, and the kernel for choices that are given.

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
    listed, length, flags, given_exact, home, token, token_ok, tile, tiles, D,
    ACTIVATION: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Activations of the ``length`` neurons of a tile that are ``listed``, less their mean.

    Flags of tokens are read at the positions of the list behind ``home`` of each token; for flagged tokens, values are
    written to the neuron's own place in the tile (``given_exact``).
    """
    for begin in range(0, length, ROWS):
        position = begin + tl.arange(0, ROWS)
        there = position < length
        inner = tl.load(listed + position, mask=there, other=0)
        neuron = tile + tiles * inner.to(tl.int64)
        rows = neuron[None, :, None] * weight_stride
        up_sum = tl.zeros([TOKENS, ROWS, COLUMNS], tl.float32)
        gate_sum = tl.zeros([TOKENS, ROWS, COLUMNS], tl.float32)
        for start in tl.range(0, D, COLUMNS, loop_unroll_factor=2):
            column = start + tl.arange(0, COLUMNS)[None, None, :]
            row_mask = there[None, :, None]
            token_mask = token_ok[:, None, None]
            if not EVEN:
                row_mask = row_mask & (column < D)
                token_mask = token_mask & (column < D)
            part = tl.load(x + token[:, None, None] * D + column, mask=token_mask, other=0.0).to(tl.float32)
            up_sum += part * tl.load(up + rows + column, mask=row_mask, other=0.0).to(tl.float32)
            if gate is not None:
                gate_sum += part * tl.load(gate + rows + column, mask=row_mask, other=0.0).to(tl.float32)
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
        keep = there[None, :] & token_ok[:, None]
        flag = tl.load(flags + home[:, None] + position[None, :], mask=keep, other=0.0)
        tl.store(given_exact + home[:, None] + inner[None, :], given, mask=keep & (flag > 0))


@triton.jit
def low_values(
    xt, GATED: tl.constexpr, gate_bias, up_bias, gate_words, gate_scales, gate_units, up_words, up_scales, up_units,
    mean, mean_stride, listed, length, flags, slot, given_low, home, token, token_ok, tile, tiles, W,
    BITS: tl.constexpr, ACTIVATION: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Activations, less their mean, of the ``length`` neurons ``listed``, by codes, of which further planes are read.

    Behind ``flags``, one and two slots on, are the products with gate and up so far. Results go to ``given_low``.
    """
    for begin in range(0, length, ROWS):
        position = begin + tl.arange(0, ROWS)
        there = position < length
        inner = tl.load(listed + position, mask=there, other=0)
        neuron = tile + tiles * inner.to(tl.int64)
        place = flags + home[:, None] + position[None, :]
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
        used = keep & (tl.load(place, mask=keep, other=0.0) > 0)
        if mean is not None:
            given -= load_mean(mean, mean_stride, neuron, there, token, token_ok)
        tl.store(given_low + home[:, None] + inner[None, :], given, mask=used)


@triton.jit
def chosen_kernel(
    x, on, on_stride, block_of, stops, gate, up, gate_bias, up_bias, weight_stride,
    lists, flags, given_exact, M, D, F, tiles,
    ACTIVATION: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Lists the neurons of one tile that some of TOKENS tokens use, and computes them.

    Tokens use the blocks that are ``on`` (M, N) bool, neuron f being in block ``block_of[f]``, f where that is None;
    or, where ``on`` is None, the first ``stops[m]`` neurons. ``lists`` (Q, S, B), ``flags`` and ``given_exact``
    (M, S, B) are as in ``triton_look``.
    """
    tile = tl.program_id(0)
    group = tl.program_id(1)
    token = group * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    token_ok = token < M
    cell = (group * tiles + tile) * TILE
    home = (token * tiles + tile) * TILE
    inner = tl.arange(0, TILE)
    neuron = tile + tiles * inner
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
    tl.store(lists + cell + position, inner, mask=some)
    tl.store(flags + home[:, None] + position[None, :], used.to(tl.float32), mask=some[None, :] & token_ok[:, None])
    nothing = tl.zeros([TOKENS, TILE], tl.float32)
    tl.store(given_exact + home[:, None] + inner[None, :], nothing, mask=token_ok[:, None] & (inner < TILE)[None, :])
    tl.debug_barrier()  # what other threads of this program wrote is read from here on
    exact_values(
        x, gate, up, gate_bias, up_bias, weight_stride, None, 0,
        lists + cell, length, flags, given_exact, home, token, token_ok, tile, tiles, D,
        ACTIVATION, TOKENS, ROWS, COLUMNS, EVEN,
    )  # fmt: skip
