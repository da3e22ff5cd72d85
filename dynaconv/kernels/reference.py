"""The truth every kernel is compared with: all neurons are computed, those of unused blocks are put to zero.

Nothing here is fast. ``block_ffn`` takes any choice of blocks, as one int64 bit mask a token (bit n = block n is used);
``masked_ffn`` takes a float mask that may carry gradients, which is what training uses. Ships with every exported
model.

Shapes: M tokens, D residual width, F neurons, N blocks (at most 64). ``edges`` are N + 1 neuron positions, from 0 to F:
block n is the neurons [edges[n], edges[n + 1]).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.nn.functional import linear

from dynaconv.kernels.weights import FFNWeights

MAX_BLOCKS = 64  # a token's choice of blocks is the bits of one int64


def width_masks(widths: torch.Tensor) -> torch.Tensor:
    """Bit masks of the first n blocks, for every width n in 0..64.

    Args:
        widths: int64, any shape.

    Returns:
        int64 of the same shape. Width 64 is -1: bit 63 is the sign.
    """
    below = (torch.ones_like(widths) << widths.clamp(max=MAX_BLOCKS - 1)) - 1
    return torch.where(widths >= MAX_BLOCKS, torch.full_like(widths, -1), below)


def blocks_on(masks: torch.Tensor, blocks: int) -> torch.Tensor:
    """Which blocks each token uses: ``(M,)`` int64 bit masks to ``(M, blocks)`` bool."""
    return (masks[:, None] >> torch.arange(blocks, device=masks.device)) & 1 == 1


def bit_masks(on: torch.Tensor) -> torch.Tensor:
    """The reverse of :func:`blocks_on`: ``(M, blocks)`` bool to ``(M,)`` int64."""
    return (on.long() << torch.arange(on.shape[1], device=on.device)).sum(1)


def block_ffn(x: torch.Tensor, masks: torch.Tensor, weights: FFNWeights, edges: Sequence[int]) -> torch.Tensor:
    """The FFN of each token restricted to the token's own blocks. Differentiable in ``x`` and the weights.

    Unused neurons are replaced, not multiplied, by zero: an infinity in one of them does not reach the result.

    Args:
        x: ``(M, D)``.
        masks: ``(M,)`` int64 bit masks, one bit a block.
        weights: The network.
        edges: N + 1 neuron positions.

    Returns:
        ``(M, D)``.
    """
    on = _per_neuron(blocks_on(masks, len(edges) - 1), edges)
    hidden = hidden_neurons(x, weights)
    return linear(torch.where(on, hidden, torch.zeros_like(hidden)), weights.down, weights.down_bias)


def masked_ffn(x: torch.Tensor, on: torch.Tensor, weights: FFNWeights, edges: Sequence[int]) -> torch.Tensor:
    """The FFN with the neurons of block n of token m multiplied by ``on[m, n]``. Differentiable in ``on`` too.

    Args:
        x: ``(M, D)``.
        on: ``(M, N)`` floating point, cast to the dtype of the hidden neurons.
        weights: The network.
        edges: N + 1 neuron positions.

    Returns:
        ``(M, D)``.
    """
    hidden = hidden_neurons(x, weights)
    return linear(hidden * _per_neuron(on.to(hidden.dtype), edges), weights.down, weights.down_bias)


def hidden_neurons(x: torch.Tensor, weights: FFNWeights) -> torch.Tensor:
    """All neurons of the network: ``(M, D)`` to ``(M, F)``."""
    up = linear(x, weights.up, weights.up_bias)
    if weights.gate is None:
        return weights.activation(up)
    return weights.activation(linear(x, weights.gate, weights.gate_bias)) * up


def _per_neuron(on: torch.Tensor, edges: Sequence[int]) -> torch.Tensor:
    """Spreads ``(M, N)`` over the neurons: ``(M, F)``. Column n is repeated as often as block n has neurons."""
    sizes = [stop - start for start, stop in pairwise(edges)]
    return torch.cat([on[:, n : n + 1].expand(-1, size) for n, size in enumerate(sizes)], dim=1)
