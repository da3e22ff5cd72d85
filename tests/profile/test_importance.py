"""Importance equals what hooks on the stock model show, padding never counts, and the stage writes what it says."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_checkpoint
from tiny_families import FAMILIES
from torch import Tensor
from transformers import AutoModelForCausalLM

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.artifacts.files import sha256
from dynaconv.artifacts.tensors import read_tensors
from dynaconv.config import DataConfig, ImportanceConfig, RunConfig
from dynaconv.convert.importance import Importance
from dynaconv.data.windows import Batch
from dynaconv.errors import CheckpointError, DataError
from dynaconv.pipeline.stage import StageContext
from dynaconv.profile.accumulators import Influence, SecondMoment
from dynaconv.profile.importance import PREFIX, SUMMARY_FILE, measure_importance
from dynaconv.profile.importance_stage import ImportanceStage
from dynaconv.profile.streaming import LayerStream
from dynaconv.progress import Progress

CPU = torch.device("cpu")
# Query, key, attention output and down projection by name: what the package finds without any.
NAMES = {
    "llama": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"),
    "gemma3_text": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"),
    "opt": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.out_proj", "fc2"),
}


def documents() -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randint(0, 257, (length,)) for length in (24, 9, 17, 2, 24, 13)]


def padded(rows: list[Tensor], length: int = 24) -> Batch:
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, document in zip(ids, rows, strict=True):
        row[: len(document)] = document
    return Batch(ids, torch.arange(length) < torch.tensor([len(d) for d in rows])[:, None])


def measured(folder: Path, text: list[Batch], to: Path, *, second_moments: bool = False) -> dict[str, Tensor]:
    to.mkdir()
    stream = LayerStream(Checkpoint.open(folder), CPU)
    summary = measure_importance(stream, text, to, second_moments=second_moments)
    assert summary.tokens == sum(batch.tokens for batch in text)
    return read_tensors(to / f"{PREFIX}.safetensors")


def by_hooks(folder: Path, family: str, text: list[Batch]) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """What passes the projections of each layer for real tokens, by place, and the residual stream between layers."""
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = stock.model.decoder.layers if family == "opt" else stock.model.layers
    seen: list[dict[str, list[Tensor]]] = [{} for _ in layers]
    stream: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]
    for batch in text:
        real = batch.attention_mask
        assert real is not None

        def keep(place: list[Tensor], mask: Tensor = real) -> Callable[[Tensor], None]:
            return lambda tensor: place.append(tensor.view(*mask.shape, -1)[mask])

        hooks = []
        for number, layer in enumerate(layers):
            for name in NAMES[family][:2]:
                note = keep(seen[number].setdefault(name, []))
                hooks.append(layer.get_submodule(name).register_forward_hook(lambda m, a, out, note=note: note(out)))
            for name in NAMES[family][2:]:
                note = keep(seen[number].setdefault(name, []))
                hooks.append(layer.get_submodule(name).register_forward_pre_hook(lambda m, a, note=note: note(a[0])))
            note = keep(stream[number])
            hooks.append(layer.register_forward_pre_hook(lambda m, a, note=note: note(a[0])))
        note = keep(stream[-1])
        hooks.append(
            layers[-1].register_forward_hook(lambda m, a, out, note=note: note(out[0] if type(out) is tuple else out))
        )
        with torch.no_grad():
            stock(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        for hook in hooks:
            hook.remove()
    return [{n: torch.cat(v) for n, v in layer.items()} for layer in seen], [torch.cat(each) for each in stream]


@pytest.mark.parametrize("family", NAMES)
def test_importance_equals_what_hooks_on_the_stock_model_see(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", family, heads=4, kv_heads=2)
    text = [padded(documents()[:4]), padded(documents()[4:])]
    found = measured(folder, text, tmp_path / "i", second_moments=True)
    layers, stream = by_hooks(folder, family, text)
    sizes, stock = Checkpoint.open(folder).sizes, AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(found["residual"], torch.stack([each.abs().mean(0) for each in stream]).mean(0))
    modules = stock.model.decoder.layers if family == "opt" else stock.model.layers
    for number, (seen, module) in enumerate(zip(layers, modules, strict=True)):
        query, key, attended, neurons = (seen[name] for name in NAMES[family])
        output, down = (module.get_submodule(name).weight.detach().norm(dim=0) for name in NAMES[family][2:])
        before, after = stream[number], stream[number + 1]
        heads = (sizes["q_head"], sizes["v_dim"])
        expected = {
            "neuron_activation": neurons.abs().mean(0),
            "neuron_importance": neurons.abs().mean(0) * down,
            "attention_activation": attended.abs().mean(0).view(heads),
            "attention_importance": (attended.abs().mean(0) * output).view(heads),
            "query_key_activation": query.abs().mean(0).view(-1, heads[1]).sum(0)
            * key.abs().mean(0).view(-1, heads[1]).sum(0),
            "influence": 1 - torch.cosine_similarity(before, after).mean(),
            "contribution": ((after - before).norm(dim=-1) / after.norm(dim=-1)).mean(),
            "neuron_moments": neurons.T @ neurons / len(neurons),
            "attention_moments": attended.T @ attended / len(attended),
        }
        assert {
            name.removeprefix(f"layers.{number}.") for name in found if name.startswith(f"layers.{number}.")
        } == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[f"layers.{number}.{name}"], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured_and_read_again(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", family)
    apart = measured(folder, [Batch(document[None]) for document in documents()], tmp_path / "apart")
    together = measured(folder, [padded(documents())], tmp_path / "together")
    for name, tensor in apart.items():  # padding never counts
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-4)
    checkpoint = Checkpoint.open(folder)
    importance = Importance.open(tmp_path / "apart", checkpoint)
    assert importance.neurons.shape == (2, checkpoint.sizes["ffn"])
    assert importance.heads.shape == (2, checkpoint.sizes["q_head"])
    for scores in (importance.residual, importance.neurons, importance.attention, importance.influence):
        assert bool((scores >= 0).all())
        assert float((scores > 0).float().mean()) > 0.9  # a ReLU may never let some neuron through


@pytest.mark.parametrize("cut", [0, 1, 300, 500])
def test_sums_of_two_parts_are_those_of_one_pass(cut: int) -> None:
    torch.manual_seed(0)
    before, after = torch.randn(500, 6), torch.randn(500, 6)
    whole, parts = (SecondMoment(6), Influence()), (SecondMoment(6), Influence())
    whole[0].add(before)
    whole[1].add(before, after)
    for part in (slice(None, cut), slice(cut, None)):
        moment, influence = SecondMoment(6), Influence()
        moment.add(before[part])
        influence.add(before[part], after[part])
        parts[0].merge(SecondMoment.from_tensors(moment.tensors()))
        parts[1].merge(influence)
    assert parts[0].tokens == parts[1].tokens == 500
    torch.testing.assert_close(parts[0].sums["gram"], before.T @ before, rtol=1e-4, atol=1e-3)
    assert float(parts[1].block_influence()) == pytest.approx(float(whole[1].block_influence()), abs=1e-6)
    assert float(parts[1].contribution()) == pytest.approx(float(whole[1].contribution()), abs=1e-6)
    nothing = Influence()
    nothing.add(before, before)
    assert float(nothing.block_influence()) == pytest.approx(0, abs=1e-6)
    assert float(nothing.contribution()) == 0


def recipe(text: Path, **importance) -> RunConfig:
    settings = {"tokens": 2048, "batch_size": 8, **importance}
    return RunConfig(data=DataConfig(train=[str(text)], sequence_length=64), importance=ImportanceConfig(**settings))


def run(config: RunConfig, source: Path, folder: Path) -> dict:
    folder.mkdir(parents=True)
    with Progress(quiet=True) as progress:
        context = StageContext(config, {"dense": source}, folder, folder / "work", progress, logging.getLogger("test"))
        return ImportanceStage().run(context)


@pytest.mark.parametrize("second_moments", [False, True])
def test_the_stage_writes_what_it_says_and_the_same_again(second_moments: bool, tiny_checkpoint, text_file, tmp_path):
    source, config = tiny_checkpoint(), recipe(text_file, second_moments=second_moments)
    metrics = run(config, source, tmp_path / "one")
    run(config, source, tmp_path / "two")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["importance.json", "importance.safetensors"]
    assert [sha256(tmp_path / "one" / f) for f in files] == [sha256(tmp_path / "two" / f) for f in files]
    summary = json.loads((tmp_path / "one" / SUMMARY_FILE).read_text())
    assert summary["tokens"] == metrics["tokens"] == 2048
    assert summary["influence"] == metrics["influence"]
    assert 4 < summary["loss"] < 12  # a random model over 257 tokens
    assert (summary["layers"], summary["second_moments"], summary["seed"]) == (2, second_moments, 0)
    assert (Importance.open(tmp_path / "one", Checkpoint.open(source)).moments is not None) == second_moments
    estimate = ImportanceStage().estimate(config, source)
    stored = sum(tensor.nbytes for tensor in read_tensors(tmp_path / "one" / "importance.safetensors").values())
    assert estimate.disk_bytes == stored
    assert estimate.peak_bytes > 4 * 64 * 2048  # at least the hidden states
    more = recipe(text_file, second_moments=second_moments, tokens=4096)
    assert ImportanceStage().estimate(more, source).flops == pytest.approx(2 * estimate.flops)


def test_bad_input_is_refused(tiny_checkpoint, text_file: Path, tmp_path: Path) -> None:
    source = tiny_checkpoint()
    with pytest.raises(DataError, match="not enough training text"):
        run(recipe(text_file, tokens=10**9), source, tmp_path / "a")
    for path in source.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        run(recipe(text_file), source, tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []
