"""Training against the same thing said plainly: stock transformers models with hooks, and what the papers write."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_models import dynamic_model
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from dynaconv.config import FinetuneConfig, LossConfig, LossesConfig
from dynaconv.data.windows import Windows, training_batch
from dynaconv.ranks import Ranks
from dynaconv.train.budget_controller import GAIN
from dynaconv.train.engine import TorchEngine
from dynaconv.train.sampler import draw
from dynaconv.train.step import Trainer

Maker = Callable[..., Path]
BLOCKS, STEPS, SEED = 4, 6, 3
CONFIG = FinetuneConfig(
    batch_size=4,
    learning_rate=3e-3,
    router_learning_rate=3e-3,
    warmup_steps=2,
    uniform_share=0.5,
    temperature=0.7,
    budgets=[0.2, 0.75],
)
DENSE = LossesConfig(full=LossConfig(1.0), distill=LossConfig(0.0), distill_full=LossConfig(0.0))


@contextmanager
def scaled(model: Any, factors: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Each layer's FFN input goes to ``factors``, whose (B, T, F) multiplies the FFN's activations."""
    hooks = []
    for number, layer in enumerate(model.model.layers):
        seen: dict[str, Tensor] = {}
        hooks += [
            layer.mlp.register_forward_pre_hook(lambda m, args, seen=seen: seen.update(x=args[0])),
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda m, args, seen=seen, number=number: (args[0] * factors(number, seen["x"]),)
            ),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Plain:
    """The default recipe's step: stock models, routers beside, everything written out."""

    def __init__(self, folder: Path, routers: list[Any]) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).train()
        self.parent = AutoModelForCausalLM.from_pretrained(folder)
        self.routers, self.error = routers, 0.0
        self.own = [p for router in routers for p in router.parameters()]
        groups = [{"params": list(self.model.parameters()), "peak": 3e-3}, {"params": self.own, "peak": 3e-3}]
        self.optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0)
        self.edge = torch.zeros(1) if routers[0].kind == "linear" else torch.arange(BLOCKS) + 0.5
        self.neurons = self.model.config.intermediate_size // BLOCKS
        ffn = sum(p.numel() for p in self.model.model.layers[0].mlp.parameters())
        self.routing = (
            sum(p.numel() for p in routers[0].parameters()) / ffn
        )  # what the router reads, of the FFN's bytes

    def score(self, layer: int, x: Tensor) -> Tensor:
        """(B, T, 1) or, of routed experts, (B, T, N)."""
        router = self.routers[layer]
        raw = router.output(functional.silu(router.hidden(x)))
        return 3.0 * torch.tanh((raw if router.linear is None else raw + router.linear(x)) / 3.0)

    def step(self, step: int, windows: Windows) -> dict[str, float]:
        ids, chosen = training_batch(windows, step, 4, SEED).input_ids, draw(CONFIG, SEED, step, STEPS)
        inputs: list[Tensor] = []
        with scaled(self.model, lambda layer, x: inputs.append(x.detach()) or torch.ones(())):
            logits = self.model(ids).logits[:, :-1].flatten(0, 1)
        with torch.no_grad():
            taught = self.parent(ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        loss = functional.cross_entropy(logits, ids[:, 1:].flatten())
        held = (taught.exp() * (taught - logits.log_softmax(-1))).sum(-1).mean()
        (0.4 * loss + 0.8 * held).backward()
        found, scores = {"loss_full": loss.item(), "kl_full": held.item()}, []
        width, edge = max(1, round(chosen.budget * BLOCKS)), self.edge
        known = [self.score(i, x).detach() for i, x in enumerate(inputs)]
        threshold = self.threshold(known, chosen.budget - self.error - self.routing)
        spent: list[float] = []

        def factors(layer: int, x: Tensor) -> Tensor:
            if not chosen.by_router:
                wanted = -edge if len(edge) > 1 else self.score(layer, x)
                on = (wanted >= wanted.sort(descending=True).values[..., width - 1, None]).float().detach()
            else:
                score = self.score(layer, x)
                score.retain_grad()
                scores.append((layer, x.detach(), score))
                soft = torch.sigmoid((score - threshold - edge) / 0.7)
                hard = (score - threshold > edge).float()
                on = hard + soft - soft.detach()
            spent.append(on.detach().mean().item())
            return on.repeat_interleave(self.neurons, -1)

        with scaled(self.model, factors):
            low = self.model(ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        divergence = (taught.exp() * (taught - low)).sum(-1).mean()
        (0.8 * divergence).backward()
        idle = len(edge) > 1 and not chosen.by_router  # the first blocks for all: no router runs
        routing = 0.0 if idle else self.routing
        found |= {"kl_dial": divergence.item(), "share_spent": routing + sum(spent) / len(spent)}
        if chosen.by_router:
            self.error += GAIN * (found["share_spent"] - chosen.budget)
            mean = sum(score.grad.mean() for _, _, score in scores) / len(scores)
            sum((-mean * self.score(layer, x)).sum() for layer, x, _ in scores).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * min(1, (step + 1) / 2) * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        for p in self.own:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = torch.nn.utils.clip_grad_norm_([*self.model.parameters(), *self.own], 1.0)
        self.optimizer.step(), self.optimizer.zero_grad()
        return found | {"gradient_norm": norm.item()}

    def threshold(self, scores: list[Tensor], share: float) -> float:
        """Between the last block that the share pays for and the first that it does not."""
        jumps = torch.stack([s - self.edge for s in scores]).flatten().double().sort(descending=True).values
        last = math.ceil(share * len(jumps) - 1e-9)
        return float(jumps[last - 1] + jumps[last]) / 2


@pytest.mark.parametrize("kind", ["width", "linear"])
def test_the_recipes_train_as_they_are_written(tiny_checkpoint: Maker, kind: str) -> None:
    folder, windows = tiny_checkpoint(ffn=128), Windows(torch.arange(1, 60).repeat(30).int(), 16)
    made = dynamic_model(folder, kind, blocks=BLOCKS)
    twin = dynamic_model(folder, kind, blocks=BLOCKS)
    parent = AutoModelForCausalLM.from_pretrained(folder)
    trainer = Trainer(TorchEngine(made, CONFIG, Ranks.single("cpu")), CONFIG, windows, STEPS, SEED, parent)
    plain = Plain(folder, [ffn.router for ffn in twin.ffns()])
    trainer.engine.model.train()
    for step in range(STEPS):
        found, expected = trainer.step(step), plain.step(step, windows)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-4), step
    ours = dict(made.named_parameters())
    for name, value in plain.model.named_parameters():
        assert torch.allclose(ours[name], value, atol=2e-4), name


def test_dense_training_is_plain_training(tiny_checkpoint: Maker) -> None:
    folder, windows = tiny_checkpoint(ffn=128), Windows(torch.arange(1, 60).repeat(30).int(), 16)
    config = replace(CONFIG, router="uniform", losses=DENSE, betas=[0.8, 0.95])
    trainer = Trainer(TorchEngine(dynamic_model(folder, "none"), config, Ranks.single("cpu")), config, windows, 4, SEED)
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.8, 0.95), weight_decay=0.0)
    for step in range(4):
        ids = training_batch(windows, step, 4, SEED).input_ids
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 2) * (0.5 + 0.5 * math.cos(math.pi * step / 4))
        optimizer.step(), optimizer.zero_grad()
        assert trainer.step(step)["loss_full"] == pytest.approx(loss.item(), rel=1e-5)
