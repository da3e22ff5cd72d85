"""Random feed-forward networks in blocks of every grain, and the FFN written as plain loops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import gelu, relu, silu

from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Choice, Prefix, Soft, Subset
from dynaconv.kernels.partition import Partition
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


def random_partition(neurons: int, blocks: int, seed: int = 0) -> Partition:
    """Uneven blocks of at least one neuron each."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randperm(neurons - 1, generator=generator)[: blocks - 1] + 1
    return Partition.at((0, *sorted(inner.tolist()), neurons))


def partitions(neurons: int) -> dict[str, Partition]:
    """One of every kind that ``neurons`` can be cut into."""
    return {
        "neurons one by one": Partition.equal(neurons, 1),
        "of 16, the last smaller": Partition.equal(neurons, 16),
        "one block": Partition.equal(neurons, neurons),
        "5 uneven": random_partition(neurons, 5),
        "64 uneven": random_partition(neurons, 64),
    }


def random_choice(kind: type[Choice], tokens: int, blocks: int, *, share: float = 0.5, seed: int = 0) -> Choice:
    """What ``tokens`` tokens use of ``blocks`` blocks, about ``share`` of them; weights of ``Soft`` are float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(tokens, blocks, generator=generator, dtype=torch.float64)
    if kind is Prefix:
        return Prefix((drawn[:, 0] * 2 * share * (blocks + 1)).long().clamp(max=blocks))
    return Subset(drawn < share) if kind is Subset else Soft(drawn)


def in_double(ffn: BlockedFFN) -> BlockedFFN:
    """The same network in float64."""
    exact = (part.double() if isinstance(part, torch.Tensor) else part for part in ffn.weights)
    return BlockedFFN(FFNWeights(*exact), ffn.partition)  # type: ignore[arg-type]


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
