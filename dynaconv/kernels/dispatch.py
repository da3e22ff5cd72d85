"""Chooses how a nested FFN is computed, and says why. Ships with every exported model.

``nested_ffn`` computes; ``decide`` tells what it would do.

Shapes: M tokens, D residual width, F neurons, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from dynaconv.kernels.cpu import prefix_ffn, staircase_ffn
from dynaconv.kernels.reference import block_ffn, hidden_neurons, width_masks
from dynaconv.kernels.weights import FFNWeights


class Decision(NamedTuple):
    """Which kernel runs, and why.

    Attributes:
        kernel: ``reference``, ``dense``, ``prefix`` or ``staircase``.
        reason: One sentence for people.
    """

    kernel: str
    reason: str


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
    kernel = decide(x, widths, weights, edges).kernel
    if kernel == "dense":
        return linear(hidden_neurons(x, weights), weights.down, weights.down_bias)
    if kernel == "prefix":
        return prefix_ffn(x, int(widths[0]), weights, edges)
    if kernel == "staircase":
        return staircase_ffn(x, widths, weights, edges)
    return block_ffn(x, width_masks(widths), weights, edges)


def decide(x: torch.Tensor, widths: torch.Tensor, weights: FFNWeights, edges: Sequence[int]) -> Decision:
    """What :func:`nested_ffn` does with these arguments, and why."""
    if x.device.type != "cpu":
        return Decision("reference", f"there is no kernel for {x.device.type}")
    if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
        return Decision("reference", "a gradient is wanted and the CPU kernels record none")
    if len(widths) == 0:
        return Decision("dense", "there are no tokens")
    low, high = (int(bound) for bound in widths.aminmax())
    if low == len(edges) - 1:
        return Decision("dense", "every token uses every block")
    if low == high:
        return Decision("prefix", "every token uses the same width")
    return Decision("staircase", "tokens use different widths")
