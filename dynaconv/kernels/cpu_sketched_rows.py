"""One neuron at a time: what the loops of the CPU backend for sketched FFNs are made of, compiled by numba.

Products with codes are sums of integers: a token is rounded to 15 bits a number, relative to the largest of the 16 that
share a lane, and taken apart into a high and a low byte. A neuron's codes lie in two records: what the first look
reads, and what is read if that wants more, in the order of reading.

Rows are padded to pieces of 256 weights, which are 8 groups of 32: lane l of 16 has weights 16 l to 16 l + 15, four at
a time. Two planes of a piece are 64 bytes: byte 4 l + i holds weights 16 l + 4 k + i, two bits each, k from 0; 8 bytes
of scales and 8 of minimums follow. One plane is 32 bytes: bit 4 l + i of 64-bit number k. Of down, 16 bytes are the 4
bits of 32 weights: byte j those of weights j and 16 + j; scales come before all of them, then minimums.

Ships with every exported model. D residual width, F neurons, M tokens, P pieces.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from dynaconv.kernels.simd import (
    bfloats,
    converted,
    cut,
    dots,
    floats,
    halves,
    integers,
    joined,
    multiply_add,
    no_integers,
    number,
    octets,
    ones,
    plus,
    product,
    splat,
    store,
    total,
    twice,
    weighed,
    zeros,
)

SILU, GELU, GELU_TANH, RELU = range(4)
FP32, BF16, FP16 = range(3)
LOWEST = 0.2785
"""None of these activations gives less than minus this."""
jit = njit(nogil=True, cache=True, error_model="numpy")


class Sizes(NamedTuple):
    """What the loops run over.

    Attributes:
        residual: D, a multiple of 16.
        pieces: P.
        planes: Planes of gate and up that there are, 2 to 4.
        second: Planes that the second look reads.
        gated: 1 where there is a gate.
        low: 1 where there are low-bit values.
        activation: :data:`SILU` to :data:`RELU`.
        dtype: :data:`FP32` to :data:`FP16`, of the exact weights.
    """

    residual: int
    pieces: int
    planes: int
    second: int
    gated: int
    low: int
    activation: int
    dtype: int


class Records(NamedTuple):
    """How the records of neurons are cut up, in bytes.

    Attributes:
        first: Length of a first record: two planes of gate (of up, without a gate), then numbers.
        numbers: Place of the numbers in it, float32: the units of scale and minimum, the bias, and what its size is
            multiplied by.
        second: Length of a second record, which begins with numbers: the units of up, the bias of up, the norm of down,
            the units of down.
        up: Place of up's first two planes.
        up_third: Place of up's third plane.
        third: Place of gate's third plane (of up's, without a gate).
        up_fourth: Place of up's fourth plane.
        fourth: Place of gate's.
        down_steps: Place of down's scales and minimums, 16 ceil(P / 2) bytes each.
        down: Place of down's four planes.
    """

    first: int
    numbers: int
    second: int
    up: int
    up_third: int
    third: int
    up_fourth: int
    fourth: int
    down_steps: int
    down: int


class Taken(NamedTuple):
    """Tokens taken apart, in the order of lanes.

    Attributes:
        high: The high bytes, (M, 256 P) int8.
        low: The low bytes.
        units: What each lane's numbers are in units of, (M, 16 P) float32.
        sums: Of each lane's numbers, (M, 16 P) float32.
    """

    high: Any
    low: Any
    units: Any
    sums: Any


class Token(NamedTuple):
    """Addresses of one token: of its own float32 numbers, and of what it was taken apart into."""

    plain: int
    high: int
    low: int
    units: int
    sums: int


class Memory(NamedTuple):
    """Addresses of an FFN: its records, and the exact weights, of down by neuron."""

    first: int
    second: int
    look: int
    up: int
    down: int


@jit
def at(array: Any) -> int:
    return np.int64(array.ctypes.data)


@jit
def activated(kind: int, value: float) -> float:
    """The nonlinearity."""
    if kind == SILU:
        return value / (np.float32(1) + np.float32(math.exp(-value)))
    if kind == RELU:
        return max(value, np.float32(0))
    if kind == GELU:
        return np.float32(0.5) * value * np.float32(1 + math.erf(value * 0.7071067811865476))
    inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
    return np.float32(0.5) * value * np.float32(1 + math.tanh(inner))


@jit
def blurred(value: float, width: float) -> float:
    """(value + sqrt(value^2 + width^2)) / 2, without cancellation."""
    root = np.float32(math.sqrt(value * value + width * width))
    return max(value, np.float32(0)) + np.float32(0.5) * width * width / (abs(value) + root)


@jit
def take_apart(x: Any, taken: Taken) -> None:
    """Takes tokens ``x`` (M, 256 P) float32 apart."""
    for token in range(len(x)):
        for lane in range(taken.units.shape[1]):
            numbers = x[token, 16 * lane : 16 * lane + 16]
            largest, summed = np.float32(0), np.float32(0)
            for i in range(16):
                largest, summed = max(largest, abs(numbers[i])), summed + numbers[i]
            unit = max(largest / np.float32(16256), np.float32(1e-37))
            taken.units[token, lane], taken.sums[token, lane] = unit, summed
            inverse, place = np.float32(1) / unit, lane // 16 * 256 + lane % 16 * 4
            for i in range(16):
                whole = np.int32(np.rint(numbers[i] * inverse))
                upper, at = (whole + 64) >> 7, place + i // 4 * 64 + i % 4
                taken.high[token, at], taken.low[token, at] = upper, whole - 128 * upper


@jit
def two_planes(row: int, pieces: int, token: Token, scales: int) -> Any:
    """The sums over a row of scale times code times number, of scale times number, and of minimum times number.

    Args:
        row: Address of the codes.
        pieces: P.
        token: What they are multiplied by.
        scales: Address of (P, 16) float32: takes each lane's scale times the unit of the token's.
    """
    found, scaled, lowered = zeros(), zeros(), zeros()
    for c in range(pieces):
        piece, place = row + 80 * c, 256 * c
        scale, sums = twice(piece, 64), floats(token.sums, 16 * c)
        scaled = multiply_add(scale, sums, scaled)
        lowered = multiply_add(twice(piece, 72), sums, lowered)
        scale = product(scale, floats(token.units, 16 * c))
        store(scales, 16 * c, scale)
        packed, high, low = integers(piece, 0), no_integers(), no_integers()
        for k in range(4):
            code = cut(packed, 2 * k, 0x03030303)
            high = dots(high, code, token.high, place + 64 * k)
            low = dots(low, code, token.low, place + 64 * k)
        found = multiply_add(weighed(high, low), scale, found)
    return total(found), total(scaled), total(lowered)


@jit
def prepare_scales(row: int, pieces: int, token: Token, scales: int) -> None:
    """Writes to ``scales`` what :func:`two_planes` writes there."""
    for c in range(pieces):
        store(scales, 16 * c, product(twice(row + 80 * c, 64), floats(token.units, 16 * c)))


@jit
def one_plane(row: int, pieces: int, token: Token, scales: int) -> float:
    """The sum over a row of scale times bit times number, from the ``scales`` that :func:`two_planes` wrote."""
    found = zeros()
    for c in range(pieces):
        high, low = no_integers(), no_integers()
        for k in range(4):
            bits = ones(row, 4 * c + k)
            high = dots(high, bits, token.high, 256 * c + 64 * k)
            low = dots(low, bits, token.low, 256 * c + 64 * k)
        found = multiply_add(weighed(high, low), floats(scales, 16 * c), found)
    return total(found)


@jit
def exact_row(kind: int, address: int, first: int, residual: int, x: int) -> float:
    """The product of ``residual`` weights from place ``first`` on with ``x``."""
    even, odd, end = zeros(), zeros(), residual - residual % 32
    if kind == BF16:
        for i in range(0, end, 32):
            even = multiply_add(bfloats(address, first + i), floats(x, i), even)
            odd = multiply_add(bfloats(address, first + i + 16), floats(x, i + 16), odd)
        for i in range(end, residual, 16):
            even = multiply_add(bfloats(address, first + i), floats(x, i), even)
    elif kind == FP32:
        for i in range(0, end, 32):
            even = multiply_add(floats(address, first + i), floats(x, i), even)
            odd = multiply_add(floats(address, first + i + 16), floats(x, i + 16), odd)
        for i in range(end, residual, 16):
            even = multiply_add(floats(address, first + i), floats(x, i), even)
    else:
        for i in range(0, residual, 16):
            even = multiply_add(halves(address, first + i), floats(x, i), even)
    return total(plus(even, odd))


@jit
def add_exact(kind: int, address: int, first: int, residual: int, factor: float, out: int) -> None:
    """Adds ``factor`` times ``residual`` weights to ``out``."""
    times = splat(factor)
    if kind == BF16:
        for i in range(0, residual, 16):
            store(out, i, multiply_add(bfloats(address, first + i), times, floats(out, i)))
    elif kind == FP32:
        for i in range(0, residual, 16):
            store(out, i, multiply_add(floats(address, first + i), times, floats(out, i)))
    else:
        for i in range(0, residual, 16):
            store(out, i, multiply_add(halves(address, first + i), times, floats(out, i)))


@jit
def add_low(record: int, how: Records, sizes: Sizes, factor: float, out: int, lowered: int, scales: int) -> None:
    """Adds ``factor`` times a neuron's low-bit column of down to ``out``, but for minimums: those to ``lowered``.

    A code is put behind the leading bit of a float32 between 16 and 32; what that adds is taken away with minimums.
    """
    groups = (sizes.pieces + 1) // 2 * 16
    scale, least = splat(factor * number(record, 4)), splat(factor * number(record, 5))
    row, sixteen = record + how.down_steps, splat(np.float32(16))
    for g in range(0, groups, 16):
        of_groups = product(converted(octets(row, g)), scale)
        store(scales, g, of_groups)
        away = multiply_add(of_groups, sixteen, product(converted(octets(row, groups + g)), least))
        store(lowered, g, plus(away, floats(lowered, g)))
    row = record + how.down
    for c in range((sizes.residual + 31) // 32):
        packed, place, times = octets(row, 16 * c), 32 * c, splat(number(scales, c))
        code = joined(packed, 19, 0x780000, 0x41800000)
        store(out, place, multiply_add(code, times, floats(out, place)))
        code = joined(packed, 15, 0x780000, 0x41800000)
        store(out, place + 16, multiply_add(code, times, floats(out, place + 16)))


@jit
def dot(numbers: int, planes: int, read: int, coarse: float, scaled: float, lowered: float) -> float:
    """A neuron's product, with its bias, from what ``read`` of its planes gave, in units of the last of them."""
    whole = np.float32(1 << (planes - read))
    found = whole * coarse + np.float32(0.5) * (whole - np.float32(1)) * scaled
    return number(numbers, 0) * found - number(numbers, 1) * lowered + number(numbers, 2)
