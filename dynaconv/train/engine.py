"""What the loop needs of whatever runs the model: backward, one optimizer step, and state that restores exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dynaconv.artifacts.tensors import read_tensors
from dynaconv.artifacts.writer import write_tensors
from dynaconv.config import FinetuneConfig, RunConfig
from dynaconv.errors import ConfigError
from dynaconv.ranks import Ranks
from dynaconv.rules import uneven
from dynaconv.train.optimizer import adamw, parameter_groups, set_learning_rates
from dynaconv.train.precision import autocast

STATE_FILE = "engine.safetensors"
CHUNK = 1 << 20  # elements of a gradient that are averaged over ranks at once, in float64


class Engine(Protocol):
    """A model with its optimizer, on one rank or several.

    Gradients are averaged over ranks; a parameter that gets none counts as having a gradient of zero.

    Attributes:
        kind: Which engine wrote a saved state.
        model: What forward passes call: the network, or a wrapper around it.
        network: The dynamic model itself.
        device: Where batches go.
        ranks: The processes that train together.
    """

    kind: str
    model: Any
    network: Any
    device: torch.device
    ranks: Ranks

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that forward passes run in."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulates gradients of ``loss``; ``last`` marks the step's final call."""

    def step(self, factor: float) -> dict[str, float]:
        """Clips, steps at ``factor`` times the peak learning rates, clears gradients.

        Returns:
            ``gradient_norm``, over all parameters, before clipping.
        """

    def save(self, folder: Path) -> None:
        """Writes all that the next step depends on into ``folder``; every rank takes part."""

    def load(self, folder: Path) -> None:
        """Restores what :meth:`save` wrote, exactly; every rank takes part."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and saved buffer, whole, by the network's names; every rank goes through all of them."""


def build_engine(network: Any, config: RunConfig, ranks: Ranks) -> Engine:
    """The engine that ``config`` asks for, with ``network`` in it.

    Raises:
        ConfigError: There are more ranks than a micro-batch has sequences, or some would get more than others;
            DeepSpeed is not installed, or its own settings contradict the recipe.
    """
    wrong = uneven(config, ranks.world)
    if wrong:
        raise ConfigError(wrong)
    if config.engine.kind == "deepspeed":
        from dynaconv.train.deepspeed import DeepSpeedEngine

        for ffn in network.ffns():
            _ = ffn.cost  # kept from here on: ZeRO 3 takes away the shapes that it follows from
        return DeepSpeedEngine(network, config, ranks)
    return TorchEngine(network, config.finetune, ranks)


class TorchEngine:
    """Plain torch: AdamW with fp32 weights, forward passes in fp32 or under bf16 autocast; each rank has it all."""

    kind = "torch"

    def __init__(self, network: Any, config: FinetuneConfig, ranks: Ranks) -> None:
        self.model = self.network = network.to(ranks.device)
        self.device, self.ranks, self.config = ranks.device, ranks, config
        self.optimizer = adamw(parameter_groups(network, config), config)
        self.peaks = [group["peak"] for group in self.optimizer.param_groups]

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 autocast where the recipe asks for it."""
        return autocast(self.config, self.device)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulates gradients of ``loss``, and averages them over ranks at the ``last`` one."""
        loss.backward()
        if last:
            for _, parameter in self._named():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                if self.ranks.world > 1:
                    parameter.grad = parameter.grad.contiguous()
                    for chunk in parameter.grad.view(-1).split(CHUNK):
                        chunk.copy_(self.ranks.mean(chunk))

    def step(self, factor: float) -> dict[str, float]:
        """One AdamW step."""
        set_learning_rates(self.optimizer, self.peaks, factor)
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in self._named()], self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"gradient_norm": float(norm)}

    def save(self, folder: Path) -> None:
        """``weight/<name>``, and ``<slot>/<name>`` of each AdamW slot, in one file."""
        if not self.ranks.main:
            return
        state: dict[str, Tensor] = {}
        for name, parameter in self._named():
            state[f"weight/{name}"] = parameter.detach()
            for slot, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{slot}/{name}"] = value
        write_tensors(folder / STATE_FILE, {name: t.cpu().contiguous() for name, t in state.items()})

    def load(self, folder: Path) -> None:
        """Restores weights and AdamW slots, at any number of ranks."""
        state = read_tensors(folder / STATE_FILE)
        slots = {key.split("/", 1)[0] for key in state} - {"weight"}
        with torch.no_grad():
            for name, parameter in self._named():
                parameter.copy_(state[f"weight/{name}"])
                found = {slot: state[f"{slot}/{name}"] for slot in slots if f"{slot}/{name}" in state}
                if found:
                    self.optimizer.state[parameter] = {
                        slot: value.clone().to("cpu" if slot == "step" else self.device)
                        for slot, value in found.items()
                    }

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The state dict; nothing has to be gathered."""
        yield from self.network.state_dict().items()

    def _named(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        return [
            (name, parameter)
            for group in self.optimizer.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
        ]
