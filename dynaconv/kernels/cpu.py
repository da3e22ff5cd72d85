"""Inference on a CPU that reads only the weights it needs. Ships with every exported model.

Both kernels use weights where they lie: a prefix of blocks is a slice of the rows of gate and up and of the columns of
down. Neither records gradients; ``reference`` is for training.

* ``prefix_ffn``: all tokens use the same width, so one slice of each matrix is all there is.
* ``staircase_ffn``: tokens differ. Sorted by width, descending, every block is used by a contiguous prefix of the rows,
  so each weight is read once, by exactly the tokens that want it. Adjacent blocks used by the same rows are one step.

Shapes: M tokens, D residual width, F neurons, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import linear

from dynaconv.kernels.reference import hidden_neurons
from dynaconv.kernels.weights import FFNWeights


@torch.no_grad()
def prefix_ffn(x: torch.Tensor, width: int, weights: FFNWeights, edges: Sequence[int]) -> torch.Tensor:
    """The FFN of every token with its first ``width`` blocks.

    Args:
        x: ``(M, D)``.
        width: Blocks used, 0 to N.
        weights: The network.
        edges: N + 1 neuron positions.

    Returns:
        ``(M, D)``, always a new tensor.
    """
    if width == 0:
        return _no_blocks(x, weights)
    stop = edges[width]
    return linear(_neurons(x, weights, 0, stop), weights.down[:, :stop], weights.down_bias)


@torch.no_grad()
def staircase_ffn(x: torch.Tensor, widths: torch.Tensor, weights: FFNWeights, edges: Sequence[int]) -> torch.Tensor:
    """The FFN of each token with the first ``widths[m]`` blocks, every weight read at most once.

    Args:
        x: ``(M, D)``.
        widths: ``(M,)`` int64, 0 to N.
        weights: The network.
        edges: N + 1 neuron positions.

    Returns:
        ``(M, D)``, always a new tensor.
    """
    ordered, order = widths.sort(descending=True)
    rows = x[order]
    total = _no_blocks(x, weights)
    for count, start, stop in stairs(ordered.tolist(), edges):
        hidden = _neurons(rows[:count], weights, start, stop)
        total[:count].addmm_(hidden, weights.down[:, start:stop].t())
    return torch.empty_like(total).index_copy_(0, order, total)


def stairs(widths: Sequence[int], edges: Sequence[int]) -> list[tuple[int, int, int]]:
    """The steps of a staircase: (rows, first neuron, end neuron), neurons ascending, rows falling.

    Args:
        widths: Descending, one a row.
        edges: N + 1 neuron positions.

    Returns:
        Steps that together cover neurons [0, edges[widths[0]]) once; none where every width is 0.
    """
    steps: list[tuple[int, int, int]] = []
    done = 0
    for count in range(len(widths), 0, -1):
        width = widths[count - 1]
        if width > done:
            steps.append((count, edges[done], edges[width]))
            done = width
    return steps


def _neurons(x: torch.Tensor, weights: FFNWeights, start: int, stop: int) -> torch.Tensor:
    """Neurons [start, stop) of the network: ``(M, D)`` to ``(M, stop - start)``."""
    part = weights._replace(
        gate=None if weights.gate is None else weights.gate[start:stop],
        up=weights.up[start:stop],
        gate_bias=None if weights.gate_bias is None else weights.gate_bias[start:stop],
        up_bias=None if weights.up_bias is None else weights.up_bias[start:stop],
    )
    return hidden_neurons(x, part)


def _no_blocks(x: torch.Tensor, weights: FFNWeights) -> torch.Tensor:
    """What the network gives with every neuron off: its down bias in each row, or zeros."""
    if weights.down_bias is None:
        return torch.zeros_like(x)
    return weights.down_bias.to(x.dtype).repeat(len(x), 1)
