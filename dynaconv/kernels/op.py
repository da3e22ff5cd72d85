"""The dynamic FFN as one torch operator, ``dynaconv::blocked_ffn``: what ``torch.compile`` sees instead of a backend.

Eager inference calls :func:`dynaconv.kernels.dispatch.blocked_ffn` itself, which saves the dispatcher's tens of
microseconds a call; the operator runs the same. Its gradients are the reference's. Ships with every exported model.

At the operator's border a choice is one tensor: int64 ``(M,)`` widths (:class:`Prefix`), bool ``(M, N)``
(:class:`Subset`) or floating ``(M, N)`` (:class:`Soft`). M tokens, D residual width, N blocks.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Choice, Prefix, Soft, Subset
from dynaconv.kernels.dispatch import blocked_ffn as dispatched_ffn
from dynaconv.kernels.partition import Partition
from dynaconv.kernels.reference import blocked_ffn as reference_ffn
from dynaconv.kernels.weights import FFNWeights

# Exported models carry a copy of this file, each with an operator of its own: two may be loaded in one process.
_NAMESPACE = "dynaconv" if __name__ == "dynaconv.kernels.op" else f"dynaconv_{zlib.crc32(__name__.encode()):08x}"

_activations: dict[str, Callable[[Tensor], Tensor]] = {}


def register_activation(name: str, function: Callable[[Tensor], Tensor]) -> None:
    """Lets the operator find the nonlinearity ``function`` by ``name``."""
    _activations[name] = function


def compiled_ffn(ffn: BlockedFFN, x: Tensor, choice: Choice, activation: str) -> Tensor:
    """The FFN ``(M, D)`` of each token restricted to its own blocks, as one operator.

    Args:
        ffn: The network.
        x: ``(M, D)``.
        choice: Over the M tokens.
        activation: Name under which the network's activation was registered.
    """
    chosen = choice.widths if isinstance(choice, Prefix) else choice.on if isinstance(choice, Subset) else choice.weight
    weights, partition = ffn.weights, ffn.partition
    result: Tensor = blocked_ffn(
        x,
        chosen,
        weights.up,
        weights.down,
        weights.gate,
        weights.up_bias,
        weights.down_bias,
        weights.gate_bias,
        partition.neurons,
        partition.block_size,
        partition.positions,
        activation,
    )
    return result


@torch.library.custom_op(f"{_NAMESPACE}::blocked_ffn", mutates_args=())
def blocked_ffn(
    x: Tensor,
    chosen: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_bias: Tensor | None,
    neurons: int,
    block_size: int,
    positions: Sequence[int],
    activation: str,
) -> Tensor:
    """See :func:`compiled_ffn`."""
    weights = FFNWeights(gate, up, down, _activations[activation], gate_bias, up_bias, down_bias)
    ffn = BlockedFFN(weights, Partition(neurons, block_size, tuple(positions)))
    return dispatched_ffn(ffn, x, _choice(chosen)).to(x.dtype)  # autocast may give another, and the fake one does not


@blocked_ffn.register_fake
def _(x: Tensor, chosen: Tensor, up: Tensor, down: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.settings = inputs[8:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Computes the reference anew, with gradients."""
    with torch.enable_grad():
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        own = [None if t is None else t.detach().requires_grad_(needs) for t, needs in needed]
        x, chosen, up, down, gate, up_bias, down_bias, gate_bias = own
        neurons, block_size, positions, activation = ctx.settings
        assert x is not None and chosen is not None and up is not None and down is not None
        weights = FFNWeights(gate, up, down, _activations[activation], gate_bias, up_bias, down_bias)
        ffn = BlockedFFN(weights, Partition(neurons, block_size, tuple(positions)))
        wanted = [t for t in own if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(reference_ffn(ffn, x, _choice(chosen)), wanted, gradient))
    gradients = [next(found) if t is not None and t.requires_grad else None for t in own]
    return (*gradients, *(None for _ in ctx.settings))


blocked_ffn.register_autograd(_backward, setup_context=_setup)


def _choice(chosen: Tensor) -> Choice:
    if chosen.dtype == torch.int64:
        return Prefix(chosen)
    return Subset(chosen) if chosen.dtype == torch.bool else Soft(chosen)
