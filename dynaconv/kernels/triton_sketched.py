"""Backend for sketch routers on a GPU, for up to 16 tokens: chooses neurons and computes them. Ships with every model.

Four launches, five with low-bit values: inputs put into the order of the codes; both looks and the activations of what
they choose (``triton_look``); down, once for exact and once for low-bit neurons (``triton_down``); the sum. A neuron
that no token of a group of four uses is not read. Nothing waits for the device, and levels are read on it: a CUDA graph
serves every dial. The first call for a network packs the codes, and must come before a graph is recorded.

M tokens, D residual width, F neurons.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dynaconv.kernels.sketched import Asked, Computed, SketchedBackend, SketchedFFN
from dynaconv.kernels.triton_decode import COLUMNS, Plan, down_and_sum, plan
from dynaconv.kernels.triton_pack import Packed, can_pack, lanes, pack, pack_rows
from dynaconv.kernels.triton_support import (
    DECODE_TOKENS,
    activation_code,
    down_rows,
    inference_on_gpu,
    power_of_two,
    row_stride,
)

MAX_REGISTERS = {1: 192, 2: 255, 4: 255}
"""Of a thread, by tokens of a program. Left to itself, the assembler aims at 128 for one token, and spills."""


class _Ready(NamedTuple):
    gate: Packed | None
    up: Packed
    down: Packed | None
    bits: tuple[int, int, int]  # of a field: first look, second look, low-bit values


_ready: WeakIdKeyDictionary = WeakIdKeyDictionary()


def can_run(ffn: SketchedFFN, x: Tensor) -> tuple[bool, str]:
    """Few tokens on a GPU, where no gradient is recorded."""
    refused = inference_on_gpu(ffn.weights, x)
    if refused is not None:
        return refused
    if len(x) > DECODE_TOKENS:
        return False, f"more than {DECODE_TOKENS} tokens together leave hardly a neuron unread"
    if activation_code(ffn.activation) is None:
        return False, f"there is no kernel for the activation {ffn.activation}"
    if not all(can_pack(codes) for codes in (ffn.gate, ffn.up, ffn.down) if codes is not None):
        return False, "groups of weights that share a scale are not multiples of 32"
    return True, "a sketch chooses neurons, for few tokens on a GPU"


@torch.no_grad()
def run(ffn: SketchedFFN, x: Tensor, asked: Asked) -> Computed:
    """The FFN of tokens ``x`` (M, D). Deterministic, and row by row the same whatever the batch."""
    x = x.contiguous()
    (count, columns), neurons, device = x.shape, len(ffn.norms), x.device
    output, counted = torch.empty_like(x), torch.empty(count, 3, dtype=torch.int32, device=device)
    if count == 0:
        return Computed(output, counted)
    low = asked.exact_level is not None
    assert not low or ffn.down is not None, "low-bit values are asked for, and the network has none"
    ready, weights = prepared(ffn), ffn.weights
    sizes = plan(count, columns, neurons, lanes(columns))
    lists = torch.empty(3, sizes.groups, sizes.tiles, sizes.tile, dtype=torch.int32, device=device)
    values = torch.empty(7 if low else 4, count, sizes.tiles, sizes.tile, dtype=torch.float32, device=device)
    given = torch.empty(2 if low else 1, count, sizes.tiles, sizes.tile, dtype=torch.float32, device=device)
    counts = torch.empty(count, sizes.tiles, 3, dtype=torch.int32, device=device)
    _choose(ffn, ready, sizes, x, asked, (lists, values, given, counts))
    few = None
    if low and ready.down is not None and ffn.down is not None:
        words = ready.down.words[0]
        assert words is not None
        few = words, ready.down.scales, ready.down.units, power_of_two(ffn.down.bits)
    down_and_sum(sizes, down_rows(weights), given, output, weights.down_bias, asked.base, few, counts, counted)
    return Computed(output, counted)


def prepared(ffn: SketchedFFN) -> _Ready:
    """The codes as the kernels read them, made by the first call for ``ffn`` and kept for as long as it lives."""
    ready = _ready.get(ffn)
    if ready is None:
        reads = (ffn.coarse, ffn.bits, ffn.up.bits)
        ready = _Ready(
            None if ffn.gate is None else pack(ffn.gate, reads),
            pack(ffn.up, reads),
            None if ffn.down is None else pack_rows(ffn.down),
            (power_of_two(ffn.coarse), _bits(ffn.bits - ffn.coarse), _bits(ffn.up.bits - ffn.bits)),
        )
        _ready[ffn] = ready
    return ready


def _bits(planes: int) -> int:
    return power_of_two(planes) if planes else 0


def _choose(
    ffn: SketchedFFN,
    ready: _Ready,
    sizes: Plan,
    x: Tensor,
    asked: Asked,
    buffers: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Fills lists, values, what neurons give, and counts; ``triton_look`` says with what."""
    from dynaconv.kernels.triton_look import prepare_kernel, sketched_kernel

    (count, columns), weights, width = x.shape, ffn.weights, lanes(x.shape[1])
    xt = torch.empty(count, 32, width, dtype=torch.float32, device=x.device)
    norm = torch.empty(count, dtype=torch.float32, device=x.device)
    prepare_kernel[(count,)](x, xt, norm, columns, width, BLOCK=min(32, power_of_two(width)), num_warps=4)
    levels = [None if one is None else one.expand(count).contiguous() for one in (asked.level, asked.exact_level)]
    bits = ready.bits
    no_gate: Packed = Packed((None, None, None), ready.up.scales, ready.up.units)
    gate = ready.gate or no_gate
    sketched_kernel[(sizes.tiles, sizes.groups)](
        x, xt, norm, levels[0], levels[1], ffn.rounding, asked.mean, row_stride(asked.mean),
        weights.gate, weights.up, weights.gate_bias, weights.up_bias, weights.up.stride(0),
        *gate.words, gate.scales, gate.units, *ready.up.words, ready.up.scales, ready.up.units,
        ffn.looked, ffn.norms, *buffers, math.exp(ffn.reach), count, columns, len(ffn.norms), width, sizes.tiles,
        COARSE=ffn.coarse, READ=ffn.bits, PLANES=ffn.up.bits, BITS=bits[0], MORE=bits[1], REST=bits[2],
        ACTIVATION=activation_code(ffn.activation), TOKENS=sizes.tokens, TILE=sizes.tile, ROWS=sizes.code_rows,
        LANES=sizes.lanes, EXACT_ROWS=sizes.exact_rows, COLUMNS=COLUMNS, EVEN=sizes.even,
        num_warps=1, maxnreg=MAX_REGISTERS[sizes.tokens],
    )  # fmt: skip


TRITON_SKETCHED = SketchedBackend("triton-sketched", can_run, run)
