"""The FFNs of a stock model, taken out so that baselines can compute them their own way, and what that costs.

D residual width, F FFN width, B windows, T tokens of a window, M tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.data.windows import Batch
from dynaconv.errors import CheckpointError
from dynaconv.evaluation.scoring import score


@dataclass(frozen=True)
class FFN:
    """down(activation(gate(x)) * up(x)), without biases.

    Attributes:
        gate: ``(F, D)``.
        up: ``(F, D)``.
        down: ``(D, F)``.
        activation: Applied to the gate.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    activation: Callable[[Tensor], Tensor]

    def hidden(self, x: Tensor) -> Tensor:
        """What the neurons give for ``(..., D)`` inputs: ``(..., F)``."""
        return self.activation(linear(x, self.gate)) * linear(x, self.up)


class Shares(NamedTuple):
    """Mean shares of the parent's FFN that a token takes.

    Attributes:
        bytes: Of its bytes in bf16, everything that is read: codes, scales, minimums, what routers read.
        flops: Of its FLOPs. Turning codes into numbers is not counted.
        active: Of its neurons.
    """

    bytes: float
    flops: float
    active: float


Network = Callable[[Tensor], tuple[Tensor, Shares]]  # (B, T, D) inputs to outputs, and their mean shares


class Method(Protocol):
    """A baseline at one setting."""

    @property
    def name(self) -> str:
        """Of its rows."""

    @property
    def setting(self) -> str:
        """What sets it apart from other rows of the name, such as ``4 bits``."""

    @property
    def share(self) -> float:
        """What was asked for: a share of the parent's FFN bytes, or of its inputs or neurons."""

    def fit(self, ffn: FFN, inputs: Tensor) -> Network:
        """The network in place of ``ffn``, whose ``inputs`` on calibration text are ``(M, D)``."""


@dataclass(frozen=True)
class MethodScore:
    """What a baseline is worth and what it spends; field for field as in :class:`dynaconv.evaluation.scoring.Score`."""

    loss: float
    agreement: float | None
    bytes_share: float
    flops_share: float
    active_share: float
    widths: tuple[float, ...] = ()


class Parent:
    """A dense model whose FFNs can be replaced.

    Args:
        model: As transformers loads it, in float32.
        checkpoint: The folder it was loaded from.

    Raises:
        CheckpointError: Its FFNs have no gate of their own, or biases.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        spec = checkpoint.family.ffn
        if spec.gate in (None, spec.up):
            raise CheckpointError(
                "the baselines need FFNs with gate, up and down matrices",
                where=checkpoint.folder,
                found=f"model type {checkpoint.family.model_type}",
                hint="take a Llama, Qwen or Mistral checkpoint",
            )
        self.model = model
        self.modules = [model.get_submodule(spec.path.format(layer=layer)) for layer in range(checkpoint.layers)]
        self.ffns = [_read(module, (str(spec.gate), spec.up, spec.down)) for module in self.modules]

    @torch.no_grad()
    def inputs(self, batches: Iterable[Batch]) -> list[Tensor]:
        """Inputs of every FFN on ``batches``, in the order of the layers: ``(M, D)`` each."""
        kept: list[list[Tensor]] = [[] for _ in self.modules]
        hooks = [
            module.register_forward_pre_hook(lambda _, args, own=own: own.append(args[0].flatten(0, -2)))
            for module, own in zip(self.modules, kept, strict=True)
        ]
        try:
            for batch in batches:
                self.model(input_ids=batch.input_ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return [torch.cat(own) for own in kept]

    @torch.no_grad()
    def score(
        self, method: Method, inputs: Sequence[Tensor], batches: Sequence[Batch], wanted: Sequence[Tensor]
    ) -> MethodScore:
        """Fits ``method`` to ``inputs`` of the FFNs and scores the model with it on ``batches``.

        Args:
            method: The baseline.
            inputs: What :meth:`inputs` gave for calibration text.
            batches: Windows.
            wanted: The parent's most likely tokens on them.
        """
        networks = [method.fit(ffn, own) for ffn, own in zip(self.ffns, inputs, strict=True)]
        with self._replaced(networks) as spent:
            got = score(self.model, batches, parent=wanted)
        tokens = sum(count for count, _ in spent)
        means = Shares(*(sum(count * own[i] for count, own in spent) / tokens for i in range(len(Shares._fields))))
        return MethodScore(got.loss, got.agreement, means.bytes, means.flops, means.active)

    @contextmanager
    def _replaced(self, networks: Sequence[Network]) -> Iterator[list[tuple[int, Shares]]]:
        """Has ``networks`` compute the FFNs, and gathers tokens and shares of every call."""
        spent: list[tuple[int, Shares]] = []

        def forward(network: Network) -> Callable[[Tensor], Tensor]:
            def run(x: Tensor) -> Tensor:
                y, shares = network(x)
                spent.append((x[..., 0].numel(), shares))
                return y

            return run

        for module, network in zip(self.modules, networks, strict=True):
            module.forward = forward(network)
        try:
            yield spent
        finally:
            for module in self.modules:
                del module.forward  # the class's own is visible again


def _read(module: Any, names: Sequence[str]) -> FFN:
    projections = [getattr(module, name) for name in names]
    if any(projection.bias is not None for projection in projections):
        raise CheckpointError("the baselines do not know FFNs with biases", found=type(module).__name__)
    gate, up, down = (projection.weight.detach() for projection in projections)
    return FFN(gate, up, down, module.act_fn)
