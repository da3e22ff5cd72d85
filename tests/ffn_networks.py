"""Random feed-forward networks and block edges, and the FFN written as plain loops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import gelu, relu, silu

from dynaconv.kernels.weights import FFNWeights

ACTIVATIONS = (silu, gelu, relu)


def random_network(
    width: int,
    neurons: int,
    *,
    gated: bool = True,
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
    activation: int = 0,
    seed: int = 0,
) -> FFNWeights:
    """A network of D = ``width`` and F = ``neurons`` whose outputs are about 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype)

    return FFNWeights(
        gate=draw(neurons, width) if gated else None,
        up=draw(neurons, width),
        down=draw(width, neurons),
        activation=ACTIVATIONS[activation],
        gate_bias=draw(neurons) if gated and bias else None,
        up_bias=draw(neurons) if bias else None,
        down_bias=draw(width) if bias else None,
    )


def random_edges(neurons: int, blocks: int, seed: int = 0) -> tuple[int, ...]:
    """Uneven blocks of at least one neuron each."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randperm(neurons - 1, generator=generator)[: blocks - 1] + 1
    return (0, *sorted(inner.tolist()), neurons)


def looped_ffn(
    x: torch.Tensor, on: Sequence[Sequence[bool]], weights: FFNWeights, edges: Sequence[int]
) -> torch.Tensor:
    """The definition: for each token, for each of its blocks, for each neuron of the block."""
    rows = []
    for row, blocks in zip(x, on, strict=True):
        total = torch.zeros_like(row) if weights.down_bias is None else weights.down_bias.clone()
        for n, used in enumerate(blocks):
            for i in range(edges[n], edges[n + 1]) if used else ():
                up = weights.up[i] @ row + (0 if weights.up_bias is None else weights.up_bias[i])
                if weights.gate is None:
                    neuron = weights.activation(up)
                else:
                    gate = weights.gate[i] @ row + (0 if weights.gate_bias is None else weights.gate_bias[i])
                    neuron = weights.activation(gate) * up
                total = total + neuron * weights.down[:, i]
        rows.append(total)
    return torch.stack(rows)
