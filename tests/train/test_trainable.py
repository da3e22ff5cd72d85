"""What is trained and what is left alone; adapters are merged into tensors that have the parent's names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_models import SELF_TAUGHT, dynamic_model, neurons_model, token_ids
from torch import Tensor
from transformers import AutoModelForCausalLM

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.config import FinetuneConfig
from dynaconv.data.windows import Windows
from dynaconv.dynamic.modeling import load
from dynaconv.dynamic.policy import ByThreshold, Uniform
from dynaconv.profile.gated import exact_margin
from dynaconv.ranks import Ranks
from dynaconv.train.budget_controller import BudgetController
from dynaconv.train.engine import TorchEngine
from dynaconv.train.estimate import trained
from dynaconv.train.model import trainable_model, write_checkpoint
from dynaconv.train.step import Trainer
from dynaconv.train.trainable import down_weight

Maker = Callable[..., Path]
CONFIG = FinetuneConfig(
    **SELF_TAUGHT, batch_size=4, learning_rate=3e-3, router_learning_rate=3e-2, warmup_steps=1, uniform_share=0.25
)

NEURONS: dict[str, Any] = {"router": "sketch", "budgets": [0.3, 0.7], "uniform_share": 0.0}


def carved(parent: Path, folder: Path) -> Path:
    """The dense checkpoint with a layout beside it, as carving leaves one."""
    made = dynamic_model(parent, "none")
    made.save_pretrained(folder)
    return folder


def tuned(folder: Path, config: FinetuneConfig, steps: int = 6) -> tuple[Any, TorchEngine]:
    """A model trained for a few steps, and its engine."""
    torch.manual_seed(0)
    engine = TorchEngine(trainable_model(folder, config), config, Ranks.single("cpu"))
    windows = Windows(torch.arange(1, 60).repeat(30).int(), 16)
    Trainer(engine, config, windows, steps, seed=3).run(0, lambda step, found: None)
    return engine.network.eval(), engine


def logits_under(model: Any, policy: Any, ids: Tensor) -> Tensor:
    with model.call.using(policy):
        logits: Tensor = model(ids).logits
    return logits


def state(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_routers_alone_leave_the_full_dial_to_the_bit(tiny_checkpoint: Maker, tmp_path: Path) -> None:
    folder, ids = carved(tiny_checkpoint(), tmp_path / "carved"), token_ids()
    config = replace(CONFIG, trainable="routers")
    before = trainable_model(folder, config).eval()
    after, _ = tuned(folder, config)
    with torch.no_grad():
        assert torch.equal(after(ids).logits, before(ids).logits)
    for name, parameter in after.named_parameters():
        assert parameter.requires_grad == (".router." in name)
    moved = [name for name, new in after.named_parameters() if not torch.equal(new, state(before)[name])]
    assert moved and all(".router." in name for name in moved)


def test_ffn_leaves_attention_embedding_and_norms_alone(tiny_checkpoint: Maker, tmp_path: Path) -> None:
    folder = carved(tiny_checkpoint(), tmp_path / "carved")
    config = replace(CONFIG, trainable="ffn")
    before = state(trainable_model(folder, config))
    after, _ = tuned(folder, config)
    moved = {name for name, value in after.state_dict().items() if not torch.equal(value, before[name])}
    assert all(".mlp." in name for name in moved)
    assert {name for name in before if "_proj" in name and ".mlp." in name} <= moved
    counted = sum(p.numel() for n, p in after.named_parameters() if p.requires_grad and ".router." not in n)
    assert trained(config, Checkpoint.open(folder)) == counted


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_merged_adapters_are_the_adapted_model(tiny_checkpoint: Maker, tmp_path: Path, family: str) -> None:
    pytest.importorskip("peft")
    folder, ids = carved(tiny_checkpoint(family), tmp_path / "carved"), token_ids()
    config = replace(CONFIG, trainable="lora", lora_rank=4, lora_alpha=8.0)
    adapted, engine = tuned(folder, config)
    out = tmp_path / "out"
    write_checkpoint(engine, folder, out, 1 << 30)
    parent, merged = Checkpoint.open(folder), Checkpoint.open(out)
    shapes = [{n: (i.shape, i.dtype) for n, i in c.reader.tensors.items()} for c in (parent, merged)]
    assert shapes[0] == shapes[1]
    stock, dynamic = AutoModelForCausalLM.from_pretrained(out).eval(), load(out).eval()
    with torch.no_grad():
        full = adapted(ids).logits
        assert torch.allclose(stock(ids).logits, full, atol=2e-5)
        assert not torch.allclose(AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits, full, atol=1e-3)
        with dynamic.call.using(Uniform(2)), adapted.call.using(Uniform(2)):
            assert torch.allclose(dynamic(ids).logits, adapted(ids).logits, atol=2e-5)
    for ffn, other in zip(dynamic.ffns(), adapted.ffns(), strict=True):
        for name, value in other.router.state_dict().items():
            assert torch.equal(ffn.router.state_dict()[name], value)
    counted = sum(p.numel() for n, p in adapted.named_parameters() if ".lora_" in n)
    assert trained(config, parent) == counted


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_adapters_of_neurons_with_low_bit_values_train_merge_and_load(
    tiny_checkpoint: Maker, tmp_path: Path, family: str
) -> None:
    """Adapted modules compute exact values; merged, the same weights are read in low bits again."""
    pytest.importorskip("peft")
    parent, folder, ids = tiny_checkpoint(family), tmp_path / "carved", token_ids()
    neurons_model(parent, means=(0.3, 0.7)).save_pretrained(folder)
    config = replace(CONFIG, **NEURONS, trainable="lora", lora_rank=4, lora_alpha=8.0)
    engine = TorchEngine(trainable_model(folder, config), config, Ranks.single("cpu"))
    before, windows = state(engine.network), Windows(torch.arange(1, 60).repeat(30).int(), 16)
    made = Trainer(engine, config, windows, 8, seed=3, exact_margin=exact_margin(engine.network))
    engine.model.train()
    losses = [made.step(step)["loss_full"] for step in range(8)]
    assert losses[-1] < losses[0] - 0.1
    adapted, out = engine.network.eval(), tmp_path / "out"
    write_checkpoint(engine, folder, out, 1 << 30)
    changed = {name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])}
    assert all(".lora_" in name or name.endswith("means") for name in changed)
    assert any(name.endswith("means") for name in changed)
    stock, dynamic = AutoModelForCausalLM.from_pretrained(out).eval(), load(out).eval()
    with torch.no_grad():
        full = adapted(ids).logits
        torch.testing.assert_close(stock(ids).logits, full, rtol=0, atol=2e-5)
        torch.testing.assert_close(dynamic(ids).logits, stock(ids).logits, rtol=0, atol=0)
        some = torch.full((2,), -2.0)
        low, exact = (
            logits_under(dynamic, policy, ids) for policy in (ByThreshold(some, exact=some + 1), ByThreshold(some))
        )
    assert 0 < float((low - exact).norm()) < float((exact - full).norm()), "merged, they have low-bit values again"
    for ffn, other in zip(dynamic.ffns(), adapted.ffns(), strict=True):
        assert torch.equal(ffn.means, other.means)


def test_only_adapters_and_routers_are_trained(tiny_checkpoint: Maker, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = carved(tiny_checkpoint(), tmp_path / "carved")
    config = replace(CONFIG, trainable="lora")
    before = trainable_model(folder, config)
    with torch.no_grad():
        assert torch.equal(before.eval()(token_ids()).logits, load(folder).eval()(token_ids()).logits), "no change yet"
    for name, parameter in before.named_parameters():
        assert parameter.requires_grad == (".lora_" in name or ".router." in name), name
    assert "lm_head" not in {name.split(".")[0] for name, p in before.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("router", ["curve", "class"])
def test_labels_see_the_adapted_weights(tiny_checkpoint: Maker, tmp_path: Path, router: str) -> None:
    """Targets come from the weights that the pass computes with, adapters included."""
    pytest.importorskip("peft")
    folder = carved(tiny_checkpoint(), tmp_path / "carved")
    adapted, engine = tuned(folder, replace(CONFIG, trainable="lora", router=router))
    out = tmp_path / "out"
    write_checkpoint(engine, folder, out, 1 << 30)
    for ffn, other in zip(load(out).ffns(), adapted.ffns(), strict=True):
        assert torch.allclose(ffn.blocked().weights.down, down_weight(other), atol=1e-6)


def test_adapters_resume_exactly(tiny_checkpoint: Maker, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = carved(tiny_checkpoint(), tmp_path / "carved")
    config = replace(CONFIG, trainable="lora")
    whole, _ = tuned(folder, config)
    windows = Windows(torch.arange(1, 60).repeat(30).int(), 16)
    torch.manual_seed(0)
    first = TorchEngine(trainable_model(folder, config), config, Ranks.single("cpu"))
    half = Trainer(first, config, windows, 6, seed=3)
    for step in range(3):
        half.step(step)
    saved = tmp_path / "state"
    saved.mkdir()
    first.save(saved)
    torch.manual_seed(9)  # adapters start elsewhere
    second = TorchEngine(trainable_model(folder, config), config, Ranks.single("cpu"))
    second.load(saved)
    Trainer(second, config, windows, 6, seed=3, controller=BudgetController(half.controller.error)).run(
        3, lambda step, found: None
    )
    for name, value in whole.named_parameters():
        assert torch.equal(value, second.network.get_parameter(name)), name


@pytest.mark.parametrize("bound", [1.5, 3.0])
def test_a_model_tuned_without_routers_loads_whatever_their_bound(
    tiny_checkpoint: Maker, tmp_path: Path, bound: float
) -> None:
    folder, made = carved(tiny_checkpoint(), tmp_path / "carved"), tmp_path / "tuned"
    made.mkdir()
    config = replace(CONFIG, router="uniform", bound=bound)
    after, engine = tuned(folder, config, steps=1)
    write_checkpoint(engine, folder, made, shard_bytes=1 << 20)
    assert not (made / "dynaconv.safetensors").exists()
    with torch.no_grad():
        assert torch.equal(load(made).eval()(token_ids()).logits, after(token_ids()).logits)
