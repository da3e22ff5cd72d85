"""Chooses how a nested FFN is computed, and says why. Ships with every exported model.

``nested_ffn`` computes; ``decide`` tells what it would do.

Shapes: M tokens, D residual width, F neurons, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from dynaconv.kernels.cpu import CLEARED_ROWS, capped_ffn, prefix_ffn, staircase_ffn, step_cost
from dynaconv.kernels.reference import block_ffn, hidden_neurons, width_masks
from dynaconv.kernels.weights import FFNWeights


class Decision(NamedTuple):
    """Which kernel runs, and why.

    Attributes:
        kernel: ``reference``, ``dense``, ``prefix``, ``capped`` or ``staircase``.
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
