"""The truth every kernel is compared with: all neurons are computed, those of unused blocks are put to zero.

:func:`select` is the step that makes an FFN dynamic. Training and models with adapters or hooks run it between their
own projection modules; :func:`blocked_ffn` puts it between plain matrix products. Outputs and gradients of every kernel
are tested against it. Ships with every exported model.

M tokens, D residual width, F neurons, N blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from dynaconv.kernels.backend import Backend
from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Choice, Soft, Subset
from dynaconv.kernels.partition import Partition
from dynaconv.kernels.weights import FFNWeights


def select(hidden: Tensor, choice: Choice, partition: Partition, mean: Tensor | None = None) -> Tensor:
    """Activations with each neuron of an unused block off.

    Differentiable in ``hidden`` and ``mean``, and in the weights of ``Soft``. Hard choices replace instead of
    multiplying: an infinity in an unused neuron does not reach the result.

    Args:
        hidden: ``(..., F)``.
        choice: Over the same tokens. Blocks that it wants in low bits are taken to be used.
        partition: Of the F neurons.
        mean: What neurons give that are off, ``(F,)`` or ``(..., F)``; ``None``: nothing.

    Returns:
        ``(..., F)``.
    """
    mask = choice.mask(partition.blocks)
    if not isinstance(choice, Soft):
        off = ~partition.spread(mask)
        return hidden.masked_fill(off, 0) if mean is None else torch.where(off, mean.to(hidden.dtype), hidden)
    # By block: backward keeps a weight a block, not one a neuron, and sums over its neurons.
    weight, parts = mask.to(hidden.dtype)[..., None], []
    change = hidden if mean is None else hidden - mean.to(hidden.dtype)
    for first, stop in partition.runs:
        run = change[..., partition.edges[first] : partition.edges[stop]].unflatten(-1, (stop - first, -1))
        parts.append((run * weight[..., first:stop, :]).flatten(-2))
    kept = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return kept if mean is None else kept + mean.to(hidden.dtype)


def blocked_ffn(ffn: BlockedFFN, x: Tensor, choice: Choice) -> Tensor:
    """The FFN of each token restricted to its own blocks: ``(M, D)`` to ``(M, D)``. Differentiable.

    Neurons in few bits give their mean exactly, as those do that are off, and what differs from it in few bits.
    """
    hidden = select(hidden_neurons(x, ffn.weights), choice, ffn.partition, ffn.mean)
    if not (isinstance(choice, Subset) and choice.exact is not None):
        return linear(hidden, ffn.weights.down, ffn.weights.down_bias)
    assert ffn.low is not None, "the choice wants low-bit values, and the network has none"
    low, mean = ffn.partition.spread(choice.on & ~choice.exact), torch.zeros((), dtype=x.dtype, device=x.device)
    if ffn.mean is not None:
        mean = ffn.mean.to(hidden.dtype)
    exact = linear(torch.where(low, mean, hidden), ffn.weights.down, ffn.weights.down_bias)
    return exact + linear((hidden_neurons(x, ffn.low) - mean).masked_fill(~low, 0), ffn.low.down)


def hidden_neurons(x: Tensor, weights: FFNWeights) -> Tensor:
    """Activations of all neurons: ``(M, D)`` to ``(M, F)``."""
    up = linear(x, weights.up, weights.up_bias)
    if weights.gate is None:
        return weights.activation(up)
    return weights.activation(linear(x, weights.gate, weights.gate_bias)) * up


def can_run(ffn: BlockedFFN, x: Tensor, choice: Choice) -> tuple[bool, str]:
    """Always."""
    if ffn.records_gradient(x):
        return True, "gradients are recorded, and fast kernels are for inference: every neuron is computed"
    if isinstance(choice, Soft):
        return True, "blocks are weighted: every neuron is computed"
    return True, f"there is no fast kernel for {x.device.type}: every neuron is computed, unused ones are masked"


REFERENCE = Backend("reference", can_run, blocked_ffn)
