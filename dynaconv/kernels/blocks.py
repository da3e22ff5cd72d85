"""A feed-forward network cut into blocks, as the kernels take it. Ships with every exported model.

Kernels reach weights through :meth:`BlockedFFN.neurons` and :meth:`BlockedFFN.columns` only, which use them where they
lie: a block is a slice of the rows of gate and up and of the columns of down, and nothing is repacked. Down may lie
transposed in memory (its columns adjacent): what is saved is the same, and so is every result up to rounding.

M tokens, D residual width, F neurons, N blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from dynaconv.kernels.partition import Partition
from dynaconv.kernels.weights import FFNWeights


@dataclass(frozen=True, eq=False)
class BlockedFFN:
    """Weights, and how their neurons are cut.

    Attributes:
        weights: The network.
        partition: Its blocks.
        low: The same network in few bits, for blocks that a :class:`Subset` does not want exact.
        mean: What neurons give that are off, ``(F,)`` or ``(M, F)``; ``None``: nothing.
    """

    weights: FFNWeights
    partition: Partition
    low: FFNWeights | None = None
    mean: Tensor | None = None

    def neurons(self, x: Tensor, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Activations of neurons [start, stop), into ``out`` where given: ``(M, D)`` to ``(M, stop - start)``."""
        weights, count = self.weights, stop - start
        bias = None if weights.up_bias is None else weights.up_bias.narrow(0, start, count)
        up = linear(x, weights.up.narrow(0, start, count), bias)
        if weights.gate is None:
            active = weights.activation(up)
            return active if out is None else out.copy_(active)
        bias = None if weights.gate_bias is None else weights.gate_bias.narrow(0, start, count)
        return torch.mul(weights.activation(linear(x, weights.gate.narrow(0, start, count), bias)), up, out=out)

    def columns(self, start: int, stop: int) -> Tensor:
        """What neurons [start, stop) add to the output at activation 1: ``(D, stop - start)``."""
        return self.weights.down.narrow(1, start, stop - start)

    def no_blocks(self, x: Tensor) -> Tensor:
        """The output with every neuron off, ``(M, D)``: the down bias in each row, or zeros."""
        if self.weights.down_bias is None:
            return torch.zeros_like(x)
        return self.weights.down_bias.to(x.dtype).repeat(len(x), 1)

    def records_gradient(self, x: Tensor) -> bool:
        """Whether gradients of ``x`` or of a weight are being recorded."""
        return torch.is_grad_enabled() and (x.requires_grad or self.weights.requires_grad)
