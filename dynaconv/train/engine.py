"""What the loop needs of whatever runs the model: backward, one optimiser step, and state that restores exactly."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from dynaconv.config import FinetuneConfig


class Engine(Protocol):
    """A model with its optimiser.

    Attributes:
        model: The dynamic model.
        device: Where batches go.
    """

    model: Any
    device: torch.device

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that forward passes run in."""

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients of ``loss``."""

    def step(self, factor: float) -> dict[str, float]:
        """Clips, steps at ``factor`` times the peak learning rates, clears gradients.

        Returns:
            Gradient norms before clipping, by parameter group.
        """

    def state(self) -> dict[str, Tensor]:
        """Weights and optimiser state by name."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores what :meth:`state` gave, exactly."""


class TorchEngine:
    """Plain torch on one device: AdamW with fp32 weights, forward passes in fp32 or under bf16 autocast."""

    def __init__(self, model: Any, config: FinetuneConfig, device: torch.device) -> None:
        self.model, self.device, self.config = model.to(device), device, config
        routers = {id(p) for ffn in model.ffns() for p in ffn.router.parameters()}
        named = list(model.named_parameters())
        groups = {
            "weights": [(n, p) for n, p in named if id(p) not in routers and p.dim() > 1],
            "vectors": [(n, p) for n, p in named if id(p) not in routers and p.dim() <= 1],
            "routers": [(n, p) for n, p in named if id(p) in routers],
        }
        peaks = {"routers": config.router_learning_rate}
        decays = {"weights": config.weight_decay}
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for _, p in group],
                    "names": [n for n, _ in group],
                    "name": name,
                    "peak": peaks.get(name, config.learning_rate),
                    "weight_decay": decays.get(name, 0.0),
                }
                for name, group in groups.items()
                if group
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 autocast where the recipe asks for it."""
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients of ``loss``."""
        loss.backward()

    def step(self, factor: float) -> dict[str, float]:
        """One AdamW step; weights and routers are clipped apart."""
        clipped: dict[str, list[Tensor]] = {"weights": [], "routers": []}
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
            clipped["routers" if group["name"] == "routers" else "weights"] += group["params"]
        norms = {
            name: float(torch.nn.utils.clip_grad_norm_(parameters, self.config.clip))
            for name, parameters in clipped.items()
            if any(p.grad is not None for p in parameters)
        }
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norms

    def state(self) -> dict[str, Tensor]:
        """``weight/<name>``, and ``<slot>/<name>`` of each AdamW slot."""
        state: dict[str, Tensor] = {}
        for name, parameter in self._named():
            state[f"weight/{name}"] = parameter.detach()
            for slot, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{slot}/{name}"] = value
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores weights and AdamW slots."""
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

    def _named(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [
            (name, parameter)
            for group in self.optimizer.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
        ]
