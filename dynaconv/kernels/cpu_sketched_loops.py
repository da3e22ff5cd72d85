"""The loops of the CPU backend for sketched FFNs, compiled by numba. Ships with every exported model.

Products with codes are sums of integers: a token is rounded to 15 bits a number, relative to the largest of the 16 that
share a lane, and taken apart into a high and a low byte. A neuron's codes lie in two records: what the first look
reads, and what is read if that wants more, in the order of reading.

Rows are padded to pieces of 256 weights, which are 8 groups of 32: lane l of 16 has weights 16 l to 16 l + 15, four at
a time. Two planes of a piece are 64 bytes: byte 4 l + i holds weights 16 l + 4 k + i, two bits each, k from 0; 8 bytes
of scales and 8 of minimums follow. One plane is 32 bytes: bit 4 l + i of 64-bit number k. Of down, 16 bytes are the 4
bits of 32 weights: byte j those of weights j and 16 + j; scales come before all of them, then minimums.

D residual width, F neurons, M tokens, P pieces.
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
    prefetch,
    product,
    splat,
    store,
    total,
    twice,
    weighed,
    zeros,
)
from dynaconv.kernels.sketched import SMALLEST

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
def _at(array: Any) -> int:
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


@jit
def first_look(
    memory: Memory, how: Records, sizes: Sizes, start: int, stop: int, tokens: Any, factors: Any, levels: Any,
    scales: int, seen: Any, rows: Any,
) -> int:  # fmt: skip
    """Which neurons of [start, stop) any token looks at twice: their number; they go to ``rows``.

    Args:
        memory: The FFN.
        how: Its records.
        sizes: Its sizes.
        start: First neuron.
        stop: The one behind the last.
        tokens: M tokens.
        factors: (M,) what tokens' sizes are multiplied by.
        levels: (M,) what they have to pass.
        scales: Address of (P, 16) float32 to work with.
        seen: ``(stop - start, M, 4)`` float32: takes of each pair the sums of codes, of scales and of minimums, and the
            size, 0 where the token does not look again.
        rows: ``(stop - start,)`` int64.
    """
    found = 0
    for neuron in range(start, stop):
        record, place, wanted = memory.first + how.first * neuron, neuron - start, False
        numbers = record + how.numbers
        for i in range(len(levels)):
            coarse, scaled, lowered = two_planes(record, sizes.pieces, tokens[i], scales)
            value, level = dot(numbers, sizes.planes, 2, coarse, scaled, lowered), levels[i]
            times, size = number(numbers, 3) * factors[i], np.float32(0)
            if max((value if value > 0 else min(-value, np.float32(LOWEST))) * times, np.float32(SMALLEST)) > level:
                size = max(abs(activated(sizes.activation, value)) * times, np.float32(SMALLEST))
                size = size if size > level else np.float32(0)
            seen[place, i, 0], seen[place, i, 1], seen[place, i, 2], seen[place, i, 3] = coarse, scaled, lowered, size
            wanted = wanted or size > 0
        if wanted:
            rows[found] = neuron
            found += 1
    return found


@jit
def second_look(
    memory: Memory, how: Records, sizes: Sizes, start: int, rows: Any, tokens: Any, levels: Any, exact_levels: Any,
    means: Any, seen: Any, scales: int, more: int, lowered: Any, out: Any, counts: Any,
) -> None:  # fmt: skip
    """Looks again at ``rows``, and adds to ``out`` what those give that are on, less their means.

    Args:
        memory: The FFN.
        how: Its records.
        sizes: Its sizes.
        start: First neuron of ``seen``.
        rows: Neurons that any token looks at twice.
        tokens: M tokens.
        levels: (M,) sizes above which neurons are on.
        exact_levels: (M,) sizes above which they are exact.
        means: What neurons give that are off, (1 or M, F), or (1, 0).
        seen: What the first look saw.
        scales: Address of (P, 16) float32 to work with.
        more: Another.
        lowered: ``(M, 16 ceil(P / 2))`` float32, takes what minimums of low-bit columns of down take away.
        out: ``(M, 256 P)`` float32.
        counts: ``(M, 3)`` int32, added to.
    """
    pieces, planes, kind, residual = sizes.pieces, sizes.planes, sizes.activation, sizes.residual
    for i in range(len(rows)):
        neuron = rows[i]
        place, first, record = neuron - start, memory.first + how.first * neuron, memory.second + how.second * neuron
        if i + 2 < len(rows):
            ahead = memory.second + how.second * rows[i + 2]
            for line in range(how.down_steps // 64):
                prefetch(ahead + 64 * line)
        for j in range(len(levels)):
            token, looked = tokens[j], seen[place, j, 3]
            if looked <= 0:
                continue
            counts[j, 0] += 1
            coarse, scaled, least = seen[place, j, 0], seen[place, j, 1], seen[place, j, 2]
            up_coarse = up_scaled = up_least = np.float32(0)
            if planes > 2:
                prepare_scales(first, pieces, token, scales)
            if sizes.gated:
                up_coarse, up_scaled, up_least = two_planes(record + how.up, pieces, token, more)
            if sizes.second > 2:
                coarse = 2 * coarse + one_plane(record + how.third, pieces, token, scales)
                if sizes.gated:
                    up_coarse = 2 * up_coarse + one_plane(record + how.up_third, pieces, token, more)
            if sizes.second > 3:
                coarse = 2 * coarse + one_plane(record + how.fourth, pieces, token, scales)
                if sizes.gated:
                    up_coarse = 2 * up_coarse + one_plane(record + how.up_fourth, pieces, token, more)
            hidden = activated(kind, dot(first + how.numbers, planes, sizes.second, coarse, scaled, least))
            if sizes.gated:
                hidden *= dot(record, planes, sizes.second, up_coarse, up_scaled, up_least)
            size = max(abs(hidden) * number(record, 3), np.float32(SMALLEST))
            if not size > levels[j]:
                continue
            counts[j, 1] += 1
            exact = sizes.low == 0 or min(size, looked) > exact_levels[j]
            if exact:
                counts[j, 2] += 1
                value = exact_row(sizes.dtype, memory.look, residual * neuron, residual, token.plain)
                hidden = activated(kind, value + number(first + how.numbers, 2))
                if sizes.gated:
                    value = exact_row(sizes.dtype, memory.up, residual * neuron, residual, token.plain)
                    hidden *= value + number(record, 2)
            elif sizes.second < 4:
                if sizes.second < 3:
                    coarse = 2 * coarse + one_plane(record + how.third, pieces, token, scales)
                coarse = 2 * coarse + one_plane(record + how.fourth, pieces, token, scales)
                hidden = activated(kind, dot(first + how.numbers, planes, 4, coarse, scaled, least))
                if sizes.gated:
                    if sizes.second < 3:
                        up_coarse = 2 * up_coarse + one_plane(record + how.up_third, pieces, token, more)
                    up_coarse = 2 * up_coarse + one_plane(record + how.up_fourth, pieces, token, more)
                    hidden *= dot(record, planes, 4, up_coarse, up_scaled, up_least)
            if means.shape[1]:
                hidden -= means[j if means.shape[0] > 1 else 0, neuron]
            if exact:
                add_exact(sizes.dtype, memory.down, residual * neuron, residual, hidden, _at(out[j]))
            else:
                add_low(record, how, sizes, hidden, _at(out[j]), _at(lowered[j]), more)


@jit
def compute(
    memory: Memory, how: Records, sizes: Sizes, start: int, stop: int, x: Any, taken: Taken, factors: Any, levels: Any,
    exact_levels: Any, means: Any, work: Any, lowered: Any, out: Any, counts: Any,
) -> None:  # fmt: skip
    """What neurons [start, stop) that are on add for tokens ``x`` (M, 256 P) float32 to ``out``, of the same shape.

    The caller keeps all arrays: addresses are no references, and compiled code lets go of what it has no use for.

    Args:
        memory: The FFN.
        how: Its records.
        sizes: Its sizes.
        start: First neuron.
        stop: The one behind the last.
        x: Tokens, padded with zeros.
        taken: The same, taken apart.
        factors: (M,) what sizes of the first look are multiplied by.
        levels: (M,) sizes above which neurons are on.
        exact_levels: (M,) sizes above which they are exact.
        means: What neurons give that are off, (1 or M, F), or (1, 0).
        work: ``(2, 16 P)`` float32.
        lowered: ``(M, 16 ceil(P / 2))`` float32, zeros.
        out: Added to.
        counts: ``(M, 3)`` int32, added to.
    """
    many = len(x)
    tokens = [
        Token(_at(x[i]), _at(taken.high[i]), _at(taken.low[i]), _at(taken.units[i]), _at(taken.sums[i]))
        for i in range(many)
    ]
    seen, rows = np.empty((stop - start, many, 4), np.float32), np.empty(stop - start, np.int64)
    found = first_look(memory, how, sizes, start, stop, tokens, factors, levels, _at(work[0]), seen, rows)
    second_look(
        memory, how, sizes, start, rows[:found], tokens, levels, exact_levels, means, seen, _at(work[0]), _at(work[1]),
        lowered, out, counts,
    )  # fmt: skip
    for i in range(many):
        for g in range(sizes.pieces * 8):
            out[i, 32 * g : 32 * g + 32] -= lowered[i, g]
