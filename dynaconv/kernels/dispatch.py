"""Chooses how a dynamic FFN is computed, and says why. Ships with every exported model.

``nested_ffn`` and ``routed_ffn`` compute; ``decide`` and ``decide_routed`` tell what they would do.

Nested, measured with ``python scripts/bench_cpu.py`` (one thread of an AMD EPYC with AVX-512, D 2048, F 8192, 8 blocks,
times as fast as the dense FFN, fp32 / bf16):

* one token: 3.5 / 3.7 at share .25, 1.9 / 2.0 at .5, 1.3 / 1.3 at .75;
* random widths, mean share .5: 1.26 / 1.03 for 8 tokens, 1.9 / 1.4 for 64, 2.0 / 1.7 for 256.

Where it does not pay: few tokens of which one is full read every weight (8 tokens in bf16: 0.96 of dense), and where
the dense FFN takes a fraction of a millisecond, masking shows (D 256, F 1024, 16 tokens: about 0.8). The loop over
widths is slower than all of this, and up to 64 tokens slower than dense.

Shapes: M tokens, D residual width, F neurons, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from dynaconv.kernels.cpu import CLEARED_ROWS, capped_ffn, prefix_ffn, staircase_ffn, step_cost
from dynaconv.kernels.reference import block_ffn, hidden_neurons, width_masks
from dynaconv.kernels.routed import grouped_ffn, grouping_pays, union_ffn
from dynaconv.kernels.weights import FFNWeights


class Decision(NamedTuple):
    """Which kernel runs, and why.

    Attributes:
        kernel: ``reference``, ``dense``, ``prefix``, ``capped`` or ``staircase``; ``union`` or ``grouped`` of blocks
            that tokens choose one by one.
        reason: One sentence for people.
    """

    kernel: str
    reason: str


SORTING_STEPS = 4
"""What sorting a small batch and putting it back costs, in further matrix products."""

OFF_CPU = Decision("reference", "there is a fast kernel for the CPU only")
GRADIENT = Decision("reference", "a gradient is wanted and the CPU kernels are for inference")
EMPTY = Decision("dense", "there are no tokens")
DENSE = Decision("dense", "every token uses every block")
PREFIX = Decision("prefix", "every token uses the same width")
CAPPED = Decision("capped", "tokens use different widths, and to compute each one's would save less than it costs")
STAIRCASE = Decision("staircase", "tokens use different widths")
ONE = Decision("union", "there is one token, and its blocks are all that is read")
UNION = Decision("union", "tokens use different blocks, and to gather each one's would save less than it costs")
GROUPED = Decision("grouped", "tokens use different blocks")


def nested_ffn(x: torch.Tensor, widths: torch.Tensor, weights: FFNWeights, edges: Sequence[int]) -> torch.Tensor:
    """The FFN of each token with the first ``widths[m]`` blocks, by the fastest kernel that serves.

    Args:
        x: ``(M, D)``.
        widths: ``(M,)`` int64, 0 to N.
        weights: The network.
        edges: N + 1 neuron positions.

    Returns:
        ``(M, D)``. With gradients where grad mode is on and ``x`` or a weight wants one.
    """
    kernel, width = _choose(x, widths, weights, edges)
    if kernel is PREFIX:
        return prefix_ffn(x, width, weights, edges)
    if kernel is STAIRCASE:
        return staircase_ffn(x, widths, weights, edges)
    if kernel is CAPPED:
        return capped_ffn(x, widths, weights, edges)
    if kernel is DENSE or kernel is EMPTY:
        return linear(hidden_neurons(x, weights), weights.down, weights.down_bias)
    return block_ffn(x, width_masks(widths), weights, edges)


def decide(x: torch.Tensor, widths: torch.Tensor, weights: FFNWeights, edges: Sequence[int]) -> Decision:
    """What :func:`nested_ffn` does with these arguments, and why."""
    return _choose(x, widths, weights, edges)[0]


def routed_ffn(x: torch.Tensor, masks: torch.Tensor, weights: FFNWeights, edges: Sequence[int]) -> torch.Tensor:
    """The FFN of each token restricted to its own blocks, by the fastest kernel that serves.

    Args:
        x: ``(M, D)``.
        masks: ``(M,)`` int64 bit masks, bit n for block n.
        weights: The network.
        edges: N + 1 neuron positions.

    Returns:
        ``(M, D)``. With gradients where grad mode is on and ``x`` or a weight wants one.
    """
    kernel = decide_routed(x, masks, weights, edges).kernel
    if kernel == "union":
        return union_ffn(x, masks, weights, edges)
    if kernel == "grouped":
        return grouped_ffn(x, masks, weights, edges)
    return block_ffn(x, masks, weights, edges)


def decide_routed(x: torch.Tensor, masks: torch.Tensor, weights: FFNWeights, edges: Sequence[int]) -> Decision:
    """What :func:`routed_ffn` does with these arguments, and why."""
    if not x.is_cpu:
        return OFF_CPU
    if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
        return GRADIENT
    if x.shape[0] == 1:
        return ONE
    return GROUPED if grouping_pays(x, masks, edges) else UNION


def _choose(x: torch.Tensor, widths: torch.Tensor, weights: FFNWeights, edges: Sequence[int]) -> tuple[Decision, int]:
    """The decision and the largest width of the batch (0 where it was not looked at).

    At one token this runs for every layer, with caches that 100 MB of weights have just gone through: ``len`` or
    ``.device.type`` of a tensor would cost 20 us each.
    """
    if not x.is_cpu:
        return OFF_CPU, 0
    if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
        return GRADIENT, 0
    values = widths.tolist()
    if not values:
        return EMPTY, 0
    low, high = min(values), max(values)
    if low == high:
        return (DENSE if low == len(edges) - 1 else PREFIX), high
    if len(values) <= CLEARED_ROWS:
        unused = sum(edges[high] - edges[value] for value in values)
        if unused * x.shape[1] <= SORTING_STEPS * step_cost(x.dtype):
            return CAPPED, high
    return STAIRCASE, high
