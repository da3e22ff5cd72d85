"""The loop: it learns, it resumes exactly, and it meets the budgets it asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_models import SELF_TAUGHT, dynamic_model
from torch import Tensor

from dynaconv.config import FinetuneConfig, LossConfig, LossesConfig
from dynaconv.data.windows import PaddedWindows, Windows
from dynaconv.errors import ArtifactError, QualityError
from dynaconv.ranks import Ranks
from dynaconv.train.budget_controller import BudgetController
from dynaconv.train.engine import TorchEngine
from dynaconv.train.optimizer import learning_rate_factor
from dynaconv.train.sampler import draw
from dynaconv.train.state import Position, load_state, save_state
from dynaconv.train.step import Trainer

Maker = Callable[..., Path]
STEPS = 8
CONFIG = FinetuneConfig(
    **SELF_TAUGHT, batch_size=4, learning_rate=3e-3, router_learning_rate=3e-3, warmup_steps=2, uniform_share=0.25
)
CPU = Ranks.single("cpu")


def text(length: int = 16) -> Windows:
    pattern = torch.arange(1, 60).repeat(30)
    return Windows(pattern.int(), length)


def trainer(folder: Path, config: FinetuneConfig, windows: Windows | None = None, parent: Any = None) -> Trainer:
    kind = {"uniform": "none", "auto": "width"}.get(config.router, config.router)
    engine = TorchEngine(dynamic_model(folder, kind), config, CPU)
    return Trainer(engine, config, windows or text(), STEPS, seed=3, parent=parent)


def only(**weights: float) -> LossesConfig:
    return LossesConfig(**{n: LossConfig(weights.get(n, 0.0)) for n in LossesConfig.__dataclass_fields__})


def consistent() -> LossesConfig:
    return replace(SELF_TAUGHT["losses"], consistency=LossConfig(0.3))


def weights(made: Trainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in made.engine.model.state_dict().items()}


@pytest.mark.parametrize("router", ["width", "linear", "curve", "class", "uniform"])
def test_losses_fall_and_shares_are_met(tiny_checkpoint: Maker, router: str) -> None:
    metrics: list[dict[str, float]] = []
    config = replace(CONFIG, router=router)
    made = trainer(tiny_checkpoint(), config)
    made.steps = 30
    made.run(0, lambda step, found: metrics.append(found))
    assert metrics[-1]["loss_full"] < 0.7 * metrics[0]["loss_full"]
    routed = metrics[8:] if router != "uniform" else []
    for found in routed:
        assert found["share_spent"] == pytest.approx(found["share_asked"], abs=0.2)
    if routed:
        mean = sum(f["share_spent"] - f["share_asked"] for f in routed) / len(routed)
        assert abs(mean) < 0.05


@pytest.mark.parametrize("router", ["width", "linear", "curve"])
@pytest.mark.parametrize("stop", [1, 5])
def test_resume_is_exact(tiny_checkpoint: Maker, tmp_path: Path, router: str, stop: int) -> None:
    folder, config = tiny_checkpoint(attention_dropout=0.1), replace(CONFIG, router=router)
    torch.manual_seed(0)
    whole, expected = trainer(folder, config), []
    whole.run(0, lambda step, found: expected.append(found))
    torch.manual_seed(0)
    first, got = trainer(folder, config), []

    def until(step: int, found: dict[str, float]) -> None:
        got.append(found)
        if step + 1 == stop:
            save_state(tmp_path, first.engine, Position(stop, first.controller.error, 1.0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(0, until)
    torch.manual_seed(99)
    second = trainer(folder, config)
    position = load_state(tmp_path, second.engine)
    second.controller = BudgetController(position.budget_error)
    second.run(position.step, lambda step, found: got.append(found))
    assert got == expected
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name


def test_an_unfinished_state_is_not_taken_for_one(tiny_checkpoint: Maker, tmp_path: Path) -> None:
    made = trainer(tiny_checkpoint(), CONFIG)
    save_state(tmp_path, made.engine, Position(2))
    (tmp_path / ".state-00000004").mkdir()
    (tmp_path / ".state-00000004" / "state.json").write_text("{")
    assert load_state(tmp_path, made.engine).step == 2
    save_state(tmp_path, made.engine, Position(4, 0.5, 2.0))
    assert load_state(tmp_path, made.engine) == Position(4, 0.5, 2.0)
    assert [path.name for path in sorted(tmp_path.glob("state-*"))] == ["state-00000004"]


def test_a_state_of_an_earlier_version_is_refused(tiny_checkpoint: Maker, tmp_path: Path) -> None:
    made = trainer(tiny_checkpoint(), CONFIG)
    save_state(tmp_path, made.engine, Position(2, 0.1, 1.0))
    file = tmp_path / "state-00000002" / "state.json"
    saved = json.loads(file.read_text())
    saved["position"] = {"step": 2, "drift": 0.1, "seconds": 1.0}
    file.write_text(json.dumps(saved))
    with pytest.raises(ArtifactError, match=r"another version(.|\n)*state-00000002(.|\n)*drift(.|\n)*begin again"):
        load_state(tmp_path, made.engine)


def test_micro_batches_give_the_gradient_of_the_whole(tiny_checkpoint: Maker) -> None:
    folder = tiny_checkpoint()
    config = replace(CONFIG, router="uniform", clip=1e9)
    whole, parts = trainer(folder, config), trainer(folder, replace(config, accumulation=4))
    a, b = whole.step(0), parts.step(0)
    assert a["loss_full"] == pytest.approx(b["loss_full"], rel=1e-5)
    assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize("router", ["width", "linear", "curve", "class"])
def test_checkpointing_changes_nothing(tiny_checkpoint: Maker, router: str) -> None:
    """Layers are recomputed under the dial of their own forward pass, which for one step are two different ones."""
    folder, config = tiny_checkpoint(), replace(CONFIG, router=router, losses=consistent())
    plain, saving = trainer(folder, config), trainer(folder, config)
    saving.engine.model.gradient_checkpointing_enable()
    plain.engine.model.train(), saving.engine.model.train()
    calls = []
    gate = saving.engine.model.model.layers[0].mlp.gate_proj  # early in the layer: recomputation stops once it has all
    gate.register_forward_hook(lambda *args: calls.append(1))
    for step in (0, 4):
        a, b = plain.step(step), saving.step(step)
        assert a == b
    assert len(calls) == 2 * 2 * 2 + 2, "two steps of two passes, each run forward twice, and of one without gradient"
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(saving)[name]), name


def test_frozen_parent_teaches_and_stays(tiny_checkpoint: Maker) -> None:
    folder = tiny_checkpoint()
    parent = dynamic_model(folder, "none").requires_grad_(False)
    before = {name: value.clone() for name, value in parent.state_dict().items()}
    made = trainer(folder, replace(CONFIG, teacher="parent"), parent=parent)
    made.run(0, lambda step, found: None)
    assert all(torch.equal(value, before[name]) for name, value in parent.state_dict().items())
    assert all(parameter.grad is None for parameter in parent.parameters())


def test_dense_training_runs_no_dial(tiny_checkpoint: Maker) -> None:
    made = trainer(tiny_checkpoint(), replace(CONFIG, router="uniform", losses=only(full=1.0)))
    found = made.step(0)
    assert "kl_dial" not in found and found["share_spent"] == 1.0


def test_padding_is_not_trained_on(tiny_checkpoint: Maker) -> None:
    documents = [torch.arange(1, n) for n in (5, 9, 14, 17)]
    folder = tiny_checkpoint()
    losses = []
    for padding in (0, 77):
        windows = PaddedWindows(torch.cat(documents).int(), torch.tensor([len(d) for d in documents]), 16, padding)
        made = trainer(folder, replace(CONFIG, router="uniform"), windows)
        losses.append(made.step(0)["loss_full"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_loss_that_is_no_number_stops_the_run(tiny_checkpoint: Maker) -> None:
    made = trainer(tiny_checkpoint(), CONFIG)
    with torch.no_grad():
        made.engine.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(QualityError, match=r"no longer a number(.|\n)*step 1 of 8(.|\n)*learning_rate"):
        made.step(0)


def test_dial_is_a_function_of_seed_and_step() -> None:
    draws = [draw(CONFIG, 1, step, 100) for step in range(100)]
    assert draws == [draw(CONFIG, 1, step, 100) for step in range(100)]
    assert draws != [draw(CONFIG, 2, step, 100) for step in range(100)]
    assert all(0.2 <= one.budget <= 0.75 for one in draws)
    assert [one.by_router for one in draws] == [False] * 25 + [True] * 75
    assert learning_rate_factor(0, 100, 10) == pytest.approx(0.1) and learning_rate_factor(99, 100, 10) < 0.001
