"""Backend for blocks on a GPU. Ships with every exported model. For inference; nothing waits for the device.

* ``listed_ffn``, up to 16 tokens, any choice: neurons that no token of a group of four uses are not read, whatever the
  blocks. Deterministic, and row by row the same whatever the batch.
* ``staircase_ffn``, more tokens with the first blocks each: sorted by width, so that a tile of tokens stops at the
  widest of them. Arithmetic follows the dial.

More tokens that choose blocks one by one are left to the reference, which is dense and masks: tokens of a tile want
different neurons, and a tensor core computes them all anyway.

M tokens, D residual width, F neurons, N blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynaconv.kernels.backend import Backend
from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Choice, Prefix, Soft, Subset
from dynaconv.kernels.partition import Partition
from dynaconv.kernels.triton_decode import COLUMNS, down_and_sum, plan
from dynaconv.kernels.triton_support import (
    DECODE_TOKENS,
    activation_code,
    down_rows,
    inference_on_gpu,
    interpreted,
)

STAIRCASE = {"ROWS": 128, "NEURONS": 64, "COLUMNS": 128, "DEPTH": 64}
"""Tile of a product: tokens; neurons of gate and up each; columns of the output; what is summed over at a time."""

STAIRCASE_FLOAT32 = {"ROWS": 32, "NEURONS": 32, "COLUMNS": 32, "DEPTH": 32}
"""The same in float32, which tensor cores do not multiply exactly."""


def can_run(ffn: BlockedFFN, x: Tensor, choice: Choice) -> tuple[bool, str]:
    """Hard choices on a GPU, where no gradient is recorded."""
    refused = inference_on_gpu(ffn.weights, x)
    if refused is not None:
        return refused
    if isinstance(choice, Soft):
        return False, "blocks are weighted"
    if activation_code(ffn.weights.activation) is None:
        return False, "there is no kernel for the activation"
    if ffn.low is not None or ffn.mean is not None:
        return False, "low-bit values, and means of neurons that are off, are computed where neurons are chosen"
    if len(x) <= DECODE_TOKENS:
        return True, "few tokens on a GPU: only neurons in use are read"
    if not isinstance(choice, Prefix):
        return False, f"more than {DECODE_TOKENS} tokens with blocks of their own: dense and masked is as fast"
    return True, "tokens use the first blocks, on a GPU"


def run(ffn: BlockedFFN, x: Tensor, choice: Choice) -> Tensor:
    """The FFN ``(M, D)`` of tokens ``x`` (M, D)."""
    return (listed_ffn if len(x) <= DECODE_TOKENS else staircase_ffn)(ffn, x, choice)


@torch.no_grad()
def listed_ffn(ffn: BlockedFFN, x: Tensor, choice: Choice) -> Tensor:
    """The FFN of a few tokens (M, D), of which only neurons in use are read."""
    from dynaconv.kernels.triton_values import chosen_kernel

    assert isinstance(choice, Prefix | Subset)
    x, weights = x.contiguous(), ffn.weights
    (count, columns), neurons = x.shape, ffn.partition.neurons
    output = torch.empty_like(x)
    if count == 0:
        return output
    sizes = plan(count, columns, neurons, 1)
    lists = torch.empty(sizes.groups, sizes.tiles, sizes.tile, dtype=torch.int32, device=x.device)
    flags, given = torch.empty(2, 1, count, sizes.tiles, sizes.tile, dtype=torch.float32, device=x.device)
    on = choice.on.contiguous() if isinstance(choice, Subset) else None
    by_neuron = on is None or ffn.partition.blocks == neurons
    chosen_kernel[(sizes.tiles, sizes.groups)](
        x, on, 0 if on is None else on.shape[1], None if by_neuron else _block_of(ffn.partition, x.device),
        _stops(ffn.partition, choice) if isinstance(choice, Prefix) else None,
        weights.gate, weights.up, weights.gate_bias, weights.up_bias, weights.up.stride(0),
        lists, flags, given, count, columns, neurons, sizes.tiles,
        ACTIVATION=activation_code(weights.activation), TOKENS=sizes.tokens, TILE=sizes.tile, ROWS=sizes.exact_rows,
        COLUMNS=COLUMNS, EVEN=sizes.even, num_warps=1,
    )  # fmt: skip
    down_and_sum(sizes, down_rows(weights), given, output, weights.down_bias)
    return output


@torch.no_grad()
def staircase_ffn(ffn: BlockedFFN, x: Tensor, choice: Choice) -> Tensor:
    """The FFN of many tokens (M, D) that use the first blocks each."""
    from dynaconv.kernels.triton_staircase import activations_kernel, down_kernel

    assert isinstance(choice, Prefix)
    x, weights = x.contiguous(), ffn.weights
    (count, columns), neurons = x.shape, ffn.partition.neurons
    output = torch.empty_like(x)
    if count == 0:
        return output
    stops, order = _stops(ffn.partition, choice).sort(descending=True, stable=True)
    hidden = torch.empty(count, neurons, dtype=x.dtype, device=x.device)
    exact = x.dtype == torch.float32
    tile = STAIRCASE_FLOAT32 if exact or interpreted() else STAIRCASE
    launch: dict[str, Any] = {"ROWS": tile["ROWS"], "DEPTH": tile["DEPTH"], "UPCAST": interpreted()}
    launch |= {"num_warps": 4 if exact else 8, "num_stages": 2 if exact else 3}
    tiles = -(-count // tile["ROWS"])
    activations_kernel[(tiles, -(-neurons // tile["NEURONS"]))](
        x, order, stops, weights.gate, weights.up, weights.gate_bias, weights.up_bias, weights.up.stride(0),
        hidden, count, columns, neurons, ACTIVATION=activation_code(weights.activation), NEURONS=tile["NEURONS"],
        EVEN=columns % tile["DEPTH"] == 0, **launch,
    )  # fmt: skip
    down = weights.down
    down_kernel[(tiles, -(-columns // tile["COLUMNS"]))](
        hidden, order, stops, down, down.stride(0), down.stride(1), weights.down_bias, output, count, columns,
        neurons, COLUMNS=tile["COLUMNS"], EVEN=neurons % tile["DEPTH"] == 0, **launch,
    )  # fmt: skip
    return output


_tables: dict[tuple[Partition, torch.device, str], Tensor] = {}


def _stops(partition: Partition, choice: Prefix) -> Tensor:
    """Neurons that each token uses, (M,) int32."""
    key = partition, choice.widths.device, "edges"
    if key not in _tables:
        _tables[key] = torch.tensor(partition.edges, dtype=torch.int32, device=choice.widths.device)
    return _tables[key][choice.widths]


def _block_of(partition: Partition, device: torch.device) -> Tensor:
    """The block of each neuron, (F,) int32."""
    key = partition, device, "blocks"
    if key not in _tables:
        sizes = torch.tensor(partition.sizes, device=device)
        _tables[key] = torch.arange(partition.blocks, device=device).repeat_interleave(sizes).int()
    return _tables[key]


TRITON = Backend("triton", can_run, run, lambda ffn, x, choice: "listed" if len(x) <= DECODE_TOKENS else "staircase")
