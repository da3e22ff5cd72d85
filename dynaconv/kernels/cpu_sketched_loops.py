"""The loops of the CPU backend for sketched FFNs, compiled by numba. Ships with every exported model.

D residual width, F neurons, M tokens, P pieces of 256 weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dynaconv.kernels.cpu_sketched_rows import (
    LOWEST,
    Memory,
    Records,
    Sizes,
    Taken,
    Token,
    activated,
    add_exact,
    add_low,
    at,
    blurred,
    dot,
    exact_row,
    jit,
    one_plane,
    prepare_scales,
    two_planes,
)
from dynaconv.kernels.simd import number, prefetch
from dynaconv.kernels.sketched import SMALLEST


@jit
def first_look(
    memory: Memory, how: Records, sizes: Sizes, start: int, stop: int, tokens: Any, factors: Any, widths: Any,
    levels: Any, scales: int, seen: Any, rows: Any,
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
        widths: (M, 2) how wide each look is blurred, 0 for not at all.
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
            value = blurred(value, widths[i, 0]) if widths[i, 0] > 0 else value
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
    memory: Memory, how: Records, sizes: Sizes, start: int, rows: Any, tokens: Any, widths: Any, levels: Any,
    exact_levels: Any, means: Any, seen: Any, scales: int, more: int, lowered: Any, out: Any, counts: Any,
) -> None:  # fmt: skip
    """Looks again at ``rows``, and adds to ``out`` what those give that are on, less their means.

    Args:
        memory: The FFN.
        how: Its records.
        sizes: Its sizes.
        start: First neuron of ``seen``.
        rows: Neurons that any token looks at twice.
        tokens: M tokens.
        widths: (M, 2) how wide each look is blurred, 0 for not at all.
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
            value = dot(first + how.numbers, planes, sizes.second, coarse, scaled, least)
            hidden = activated(kind, value)
            size = activated(kind, blurred(value, widths[j, 1])) if widths[j, 1] > 0 else hidden
            if sizes.gated:
                value = dot(record, planes, sizes.second, up_coarse, up_scaled, up_least)
                hidden, size = hidden * value, size * value
            size = max(abs(size) * number(record, 3), np.float32(SMALLEST))
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
                add_exact(sizes.dtype, memory.down, residual * neuron, residual, hidden, at(out[j]))
            else:
                add_low(record, how, sizes, hidden, at(out[j]), at(lowered[j]), more)


@jit
def compute(
    memory: Memory, how: Records, sizes: Sizes, start: int, stop: int, x: Any, taken: Taken, factors: Any, widths: Any,
    levels: Any, exact_levels: Any, means: Any, work: Any, lowered: Any, out: Any, counts: Any,
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
        widths: (M, 2) how wide each look is blurred, 0 for not at all.
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
        Token(at(x[i]), at(taken.high[i]), at(taken.low[i]), at(taken.units[i]), at(taken.sums[i])) for i in range(many)
    ]
    seen, rows = np.empty((stop - start, many, 4), np.float32), np.empty(stop - start, np.int64)
    found = first_look(memory, how, sizes, start, stop, tokens, factors, widths, levels, at(work[0]), seen, rows)
    second_look(
        memory, how, sizes, start, rows[:found], tokens, widths, levels, exact_levels, means, seen, at(work[0]),
        at(work[1]), lowered, out, counts,
    )  # fmt: skip
    for i in range(many):
        for g in range(sizes.pieces * 8):
            out[i, 32 * g : 32 * g + 32] -= lowered[i, g]
