"""Single neurons at the full dial are the parent to the bit, whatever the family, width and precision."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_models import neurons_model, token_ids
from tiny_families import FAMILIES
from transformers import AutoModelForCausalLM

import dynaconv
from dynaconv import Dial
from dynaconv.artifacts.files import sha256
from dynaconv.config import DataConfig, ProfileConfig, RunConfig, SketchConfig
from dynaconv.convert.stage import CarveStage
from dynaconv.dynamic.layout import CopyLayout
from dynaconv.dynamic.policy import ByThreshold
from dynaconv.dynamic.recorder import Recorder
from dynaconv.pipeline.stage import Stage, StageContext
from dynaconv.profile.stage import ProfileStage
from dynaconv.progress import Progress

Maker = Callable[..., Path]
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"ffn": 67, "mlp_bias": True, "tied": True},
    "mistral": {"dtype": torch.bfloat16},
    "qwen2": {"ffn": 131, "dtype": torch.bfloat16, "tied": True},
    "gpt2": {"ffn": 67, "dtype": torch.bfloat16},
    "opt": {"ffn": 97, "tied": True},
    "phi3": {"ffn": 35},
    "starcoder2": {"ffn": 33, "use_bias": False},
    "granite": {"mlp_bias": True, "ffn": 5},
}


def run(stage: Stage, config: RunConfig, inputs: dict[str, Path], folder: Path) -> Path:
    folder.mkdir(parents=True)
    stage.run(StageContext(config, inputs, folder, folder, Progress(quiet=True), logging.getLogger("test")))
    return folder


@pytest.mark.parametrize("values", ["mixed", "exact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_carved_neurons_are_the_parent_to_the_bit(
    tmp_path: Path, tiny_checkpoint: Maker, text_file: Path, family: str, values: str
) -> None:
    config = RunConfig(
        data=DataConfig(train=[str(text_file)], sequence_length=32),
        profile=ProfileConfig(tokens=512, batch_size=4),
        sketch=SketchConfig(values=values),
    )
    dense, ids = tiny_checkpoint(family, **SETTINGS.get(family, {})), token_ids(2, 40)
    statistics = run(ProfileStage(), config, {"dense": dense}, tmp_path / "statistics")
    folder = run(CarveStage(), config, {"dense": dense, "statistics": statistics}, tmp_path / "carved")
    assert sha256(folder / "model.safetensors") == sha256(dense / "model.safetensors"), "neurons stay where they are"
    parent, stock = (AutoModelForCausalLM.from_pretrained(each).eval() for each in (dense, folder))
    model = dynaconv.load(folder).eval()
    assert model.layout.blocks == model.layout.partition.neurons
    assert model.layout.copy == CopyLayout(4 if values == "mixed" else 3, 32, values == "mixed")
    with torch.no_grad():
        expected = parent(ids).logits
        assert torch.equal(stock(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids, dial=1.0).logits, expected)
        low, again = (model(ids, dial=Dial.uniform(model.layout.blocks // 2)).logits for _ in range(2))
    assert low.isfinite().all() and torch.equal(low, again) and not torch.equal(low, expected)
    for ffn in model.ffns():
        assert bool(ffn.router.offset.isfinite()) and bool((ffn.router.up_mean > 0).all() or ffn.names.gate is None)


@pytest.mark.parametrize("means", [(), (0.25, 0.5)], ids=["nothing", "means"])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_on_is_the_parent_and_everything_off_is_the_means(
    tiny_checkpoint: Maker, family: str, means: tuple[float, ...]
) -> None:
    """Through the routers, which the full dial does not run."""
    folder, ids = tiny_checkpoint(family, ffn=67), token_ids()
    parent, model = AutoModelForCausalLM.from_pretrained(folder).eval(), neurons_model(folder, means=means)
    weights = torch.tensor([0.25, 0.75]) if means else None
    with torch.no_grad():
        expected = parent(ids).logits
        everything = torch.full((2,), -torch.inf)
        with model.call.using(ByThreshold(everything, exact=everything, means=weights)):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
        with model.call.using(ByThreshold(-everything, exact=-everything, means=weights)):
            found = model(ids).logits
        hooks = []
        for ffn in model.ffns():  # the parent whose neurons all give their mean
            given = torch.zeros(67) if weights is None else weights @ ffn.means
            down = parent.get_submodule(f"{ffn.names.path.format(layer=ffn.site.index)}.{ffn.names.down}")
            hooks.append(down.register_forward_pre_hook(lambda module, args, given=given: (given.expand_as(args[0]),)))
        torch.testing.assert_close(found, parent(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_low_bit_values_are_those_of_a_checkpoint_in_low_bits(tiny_checkpoint: Maker, family: str) -> None:
    folder, ids = tiny_checkpoint(family), token_ids()
    model, rounded = neurons_model(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    everything = torch.full((2,), -torch.inf)
    with torch.no_grad():
        with model.call.using(ByThreshold(everything, exact=-everything)):
            found = model(ids).logits
        twin = neurons_model(folder, stock=rounded)
        for ffn, other in zip(model.ffns(), twin.ffns(), strict=True):
            for name in ("gate", "up", "down"):
                value = getattr(other.weights(), name)
                if value is not None:
                    value.copy_(getattr(ffn.copy.low(ffn.weights()), name))
        torch.testing.assert_close(found, twin(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, model(ids).logits, atol=1e-3)


def test_each_dial_of_a_batch_and_the_full_one_among_them(tiny_checkpoint: Maker) -> None:
    folder, ids = tiny_checkpoint("llama", ffn=67), token_ids(3)
    model = neurons_model(folder)
    model.layout = replace(model.layout, frontier=None)
    with torch.no_grad():
        found = model(ids, dial=[1.0, 0.25, 1.0]).logits
        parent = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
    torch.testing.assert_close(found[::2], parent[::2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[1], parent[1], atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_a_model_that_holds_low_bit_values_alone_uses_them_for_exact_ones(tiny_checkpoint: Maker, family: str) -> None:
    """At a dial at which no value is exact both compute the same; at the full one all values are low-bit."""
    model = neurons_model(tiny_checkpoint(family))
    packed, ids = neurons_model(tiny_checkpoint(family)), token_ids()
    before = sum(p.numel() for p in packed.parameters())
    for ffn in packed.ffns():
        ffn.pack()
    held = sum(module.weight.numel() for ffn in packed.ffns() for module in ffn.projections())
    assert held == 0 and sum(p.numel() for p in packed.parameters()) < before
    some = torch.full((2,), -1.0)
    with torch.no_grad():
        with model.call.using(ByThreshold(some, exact=torch.full((2,), torch.inf))):
            expected = model(ids).logits
        for exact in (torch.inf, 0.0):
            with packed.call.using(ByThreshold(some, exact=torch.full((2,), exact))):
                torch.testing.assert_close(packed(ids).logits, expected, rtol=1e-5, atol=1e-5)
        everything = torch.full((2,), -torch.inf)
        with model.call.using(ByThreshold(everything, exact=-everything)):
            expected = model(ids).logits
        torch.testing.assert_close(packed(ids).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="cannot be saved"):
        packed.save_pretrained("nowhere")


def test_low_bit_values_alone_cost_all_planes_at_the_full_dial(tiny_checkpoint: Maker) -> None:
    model, recorder = neurons_model(tiny_checkpoint()), Recorder()
    for ffn in model.ffns():
        ffn.pack()
    with torch.no_grad(), model.call.using(recorder=recorder):
        model(token_ids(), dial=1.0)
    cost = model.ffns()[0].cost.bytes
    assert float(recorder.all_costs()[2].mean()) == pytest.approx(cost.of(1.0, 0.0, 1.0))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_projections_that_are_more_than_weights_use_exact_values_and_are_charged_for_them(
    tiny_checkpoint: Maker, family: str
) -> None:
    """As with adapters: a module with a hook is called, and nothing but its weight could be read in low bits."""
    model, ids, some = neurons_model(tiny_checkpoint(family)), token_ids(), torch.full((2,), -1.0)
    low, called = ByThreshold(some, exact=some + 100), Recorder()
    with torch.no_grad():
        with model.call.using(ByThreshold(some)):
            expected = model(ids).logits
        with model.call.using(low):
            rounded = model(ids).logits
        for ffn in model.ffns():
            for module in ffn.projections():
                module.register_forward_hook(lambda module, given, out: out)
        with model.call.using(low, called):
            found = model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, rounded, atol=1e-4)
    active, exact, *_ = called.all_costs()
    assert torch.equal(active, exact) and 0 < float(active.mean()) < 1
