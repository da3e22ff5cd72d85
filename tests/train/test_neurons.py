"""Fine-tuning over single neurons: it learns, spends what it is asked to, trains means, and resumes exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dynamic_models import SELF_TAUGHT, dynamic_model, neurons_model
from torch import Tensor

from dynaconv.config import FinetuneConfig
from dynaconv.data.windows import Windows
from dynaconv.errors import ConfigError
from dynaconv.profile.gated import exact_margin
from dynaconv.ranks import Ranks
from dynaconv.train.engine import TorchEngine
from dynaconv.train.neurons import training_budgets
from dynaconv.train.state import Position, load_state, save_state
from dynaconv.train.step import Trainer
from dynaconv.train.trainable import choose

Maker = Callable[..., Path]
STEPS = 10
CONFIG = FinetuneConfig(
    **(SELF_TAUGHT | {"budgets": [0.3, 0.7]}), batch_size=4, learning_rate=3e-3, warmup_steps=2, router="sketch"
)


def trainer(folder: Path, config: FinetuneConfig = CONFIG) -> Trainer:
    model = neurons_model(folder, means=(0.3, 0.5, 0.7))
    margin = exact_margin(model)
    choose(model, config.trainable)
    windows = Windows(torch.arange(1, 60).repeat(30).int(), 16)
    engine = TorchEngine(model, config, Ranks.single("cpu"))
    made = Trainer(engine, config, windows, STEPS, seed=3, exact_margin=margin)
    made.engine.model.train()
    return made


def weights(made: Trainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in made.engine.network.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_losses_fall_and_budgets_are_spent(tiny_checkpoint: Maker, family: str) -> None:
    made = trainer(tiny_checkpoint(family))
    before, metrics = weights(made), [made.step(step) for step in range(STEPS)]
    assert metrics[-1]["loss_full"] < metrics[0]["loss_full"] - 0.3
    asked, spent = (sum(step[name] for step in metrics) / STEPS for name in ("share_asked", "share_spent"))
    assert spent == pytest.approx(asked, abs=0.05)
    after = weights(made)
    for name in ("means", "up_proj" if family == "llama" else "c_fc" if family == "gpt2" else "gate_up_proj"):
        assert any(not torch.equal(after[key], before[key]) for key in before if name in key), name
    same = [key for key in before if "offset" in key or "up_mean" in key]
    assert same and all(torch.equal(after[key], before[key]) for key in same), "calibration alone sets these"


def test_what_is_trained_without_weights_are_the_means(tiny_checkpoint: Maker) -> None:
    made = trainer(tiny_checkpoint(), replace(CONFIG, trainable="routers"))
    before = weights(made)
    for step in range(2):
        made.step(step)
    changed = {name for name, value in weights(made).items() if not torch.equal(value, before[name])}
    assert changed == {f"model.layers.{layer}.mlp.means" for layer in range(2)}


def test_it_resumes_exactly(tiny_checkpoint: Maker, tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    whole, first = trainer(folder), trainer(folder)
    for step in range(4):
        expected = whole.step(step)
    for step in range(2):
        first.step(step)
    save_state(tmp_path, first.engine, Position(2, first.controller.error, 0.0))
    again = trainer(folder)
    position = load_state(tmp_path, again.engine)
    again.controller.error = position.budget_error
    for step in range(position.step, 4):
        found = again.step(step)
    assert found == expected
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(again).items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_gradients_of_a_low_dial_reach_weights_and_means(tiny_checkpoint: Maker, family: str) -> None:
    model = neurons_model(tiny_checkpoint(family)).train()
    ids = torch.arange(1, 41).view(2, 20)
    model(ids, labels=ids, dial=0.25).loss.backward()
    for ffn in model.ffns():
        assert ffn.means.grad[0].abs().sum() > 0 and ffn.means.grad[1].abs().sum() == 0, "the set of .25 alone"
        for module in ffn.projections():
            weight = getattr(module, "base_layer", module).weight
            assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_budgets_that_a_recipe_leaves_open_follow_from_the_model(tiny_checkpoint: Maker) -> None:
    folder, free = tiny_checkpoint(), replace(CONFIG, budgets=None)
    for model in (neurons_model(folder), dynamic_model(folder, "linear")):
        low, high = training_budgets(model, free)
        assert model.ffns()[0].cost.bytes.fixed < low < high <= 1
        assert training_budgets(model, CONFIG) == [0.3, 0.7]
    with pytest.raises(ConfigError, match="the routers alone read"):
        training_budgets(neurons_model(folder), replace(CONFIG, budgets=[0.01, 0.5]))
