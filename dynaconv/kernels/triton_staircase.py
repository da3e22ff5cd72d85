"""Triton kernels for many tokens that use the first neurons each, sorted by how many, descending.

A tile of tokens computes the neurons of its first token, the widest; programs beyond end at once, by numbers that they
read on the device. What a token of the tile does not use is put to zero.

Imported when the first kernel runs. Ships with every exported model. M tokens, D residual width, F neurons.
"""
# mypy: ignore-errors
# Kernels are read by Triton, not run as Python: types mean nothing in them.

from __future__ import annotations

import importlib

from dynaconv.kernels.triton_parts import activate

triton = importlib.import_module("triton")  # no import statement: models must load where it is not installed
tl = importlib.import_module("triton.language")


@triton.jit
def add_product(left, right, total, UPCAST: tl.constexpr):
    """``total`` (A, B) float32 and ``left`` (A, C) times ``right`` (C, B).

    UPCAST for the interpreter, which multiplies the bit patterns of bf16.
    """
    if UPCAST:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def activations_kernel(
    x, order, stops, gate, up, gate_bias, up_bias, weight_stride, hidden, M, D, F,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Activations of ROWS tokens and NEURONS neurons: ``hidden`` (M, F), tokens in ``order``.

    Of the arguments:

        x: ``(M, D)``.
        order: ``(M,)`` int64, tokens by width, descending; ``stops`` (M,) int32: how many neurons they use.
        EVEN: Whether DEPTH divides D.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < M
    widest = tl.load(stops + tl.program_id(0) * ROWS)
    begin = tl.program_id(1) * NEURONS
    if begin < widest:
        neuron = begin + tl.arange(0, NEURONS)
        there = neuron < F
        token = tl.load(order + row, mask=row_ok, other=0)
        stop = tl.load(stops + row, mask=row_ok, other=0)
        up_sum = tl.zeros([ROWS, NEURONS], tl.float32)
        gate_sum = tl.zeros([ROWS, NEURONS], tl.float32)
        weight_at = tl.where(there, neuron, 0).to(tl.int64)[None, :] * weight_stride  # in range: no mask is needed
        token_at = token[:, None] * D
        for start in range(0, D, DEPTH):
            column = start + tl.arange(0, DEPTH)
            if EVEN:
                part = tl.load(x + token_at + column[None, :])
                weight = tl.load(up + weight_at + column[:, None])
            else:
                part = tl.load(x + token_at + column[None, :], mask=(column < D)[None, :], other=0.0)
                weight = tl.load(up + weight_at + column[:, None], mask=(column < D)[:, None], other=0.0)
            up_sum = add_product(part, weight, up_sum, UPCAST)
            if gate is not None:
                if EVEN:
                    weight = tl.load(gate + weight_at + column[:, None])
                else:
                    weight = tl.load(gate + weight_at + column[:, None], mask=(column < D)[:, None], other=0.0)
                gate_sum = add_product(part, weight, gate_sum, UPCAST)
        if up_bias is not None:
            up_sum += tl.load(up_bias + neuron, mask=there, other=0.0).to(tl.float32)[None, :]
        if gate is not None:
            if gate_bias is not None:
                gate_sum += tl.load(gate_bias + neuron, mask=there, other=0.0).to(tl.float32)[None, :]
            given = activate(gate_sum, ACTIVATION) * up_sum
        else:
            given = activate(up_sum, ACTIVATION)
        given = tl.where(neuron[None, :] < stop[:, None], given, 0.0)
        place = hidden + row.to(tl.int64)[:, None] * F + neuron[None, :]
        tl.store(place, given.to(hidden.dtype.element_ty), mask=row_ok[:, None] & there[None, :])


@triton.jit
def down_kernel(
    hidden, order, stops, down, column_stride, neuron_stride, bias, output, M, D, F,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Output (M, D) of ROWS tokens and COLUMNS columns, each token in its own place.

    Of the arguments:

        hidden: As :func:`activations_kernel` writes it; ``order`` and ``stops`` likewise.
        down: ``(D, F)`` with both strides.
        bias: ``(D,)`` or None.
        EVEN: Whether DEPTH divides F.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < M
    widest = tl.load(stops + tl.program_id(0) * ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < D
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    row_at = tl.where(row_ok, row, 0).to(tl.int64)[:, None] * F  # in range: rows beyond are not stored
    column_at = tl.where(inside, column, 0).to(tl.int64)[None, :] * column_stride
    # Up to the next multiple of NEURONS, which DEPTH divides, neurons beyond the widest were written, as zeros. So
    # no mask depends on the widest, which would keep loads from being issued ahead.
    for start in range(0, widest, DEPTH):
        neuron = start + tl.arange(0, DEPTH)
        weight_at = down + column_at + neuron.to(tl.int64)[:, None] * neuron_stride
        if EVEN:
            part = tl.load(hidden + row_at + neuron[None, :])
            weight = tl.load(weight_at)
        else:
            part = tl.load(hidden + row_at + neuron[None, :], mask=(neuron < F)[None, :], other=0.0)
            weight = tl.load(weight_at, mask=(neuron < F)[:, None], other=0.0)
        total = add_product(part, weight, total, UPCAST)
    if bias is not None:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    token = tl.load(order + row, mask=row_ok, other=0)
    place = output + token[:, None] * D + column[None, :]
    tl.store(place, total.to(output.dtype.element_ty), mask=row_ok[:, None] & inside[None, :])
