"""The carve stage: what it writes, what it reports, what it refuses, and what it says it will cost."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_statistics import fake_statistics

from dynaconv.artifacts.files import read_json, write_json
from dynaconv.artifacts.tensors import read_tensors, write_tensors
from dynaconv.config import CarveConfig, RunConfig
from dynaconv.convert.ridge import solve_ridge
from dynaconv.convert.stage import CarveStage
from dynaconv.dynamic.layout import Layout
from dynaconv.errors import ArtifactError, CheckpointError, ConfigError, StaleArtifactError
from dynaconv.pipeline.stage import StageContext
from dynaconv.progress import Progress

Make = Callable[..., Path]
NESTED = RunConfig(experts="nested", blocks=4)


def context_of(tmp_path: Path, dense: Path, statistics: Path, config: RunConfig) -> StageContext:
    folder, work = tmp_path / "carved", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    inputs = {"dense": dense, "statistics": statistics}
    return StageContext(config, inputs, folder, work, Progress(quiet=True), logging.getLogger("test"))


def carve(
    tmp_path: Path, dense: Path, statistics: Path, config: RunConfig = NESTED, **carve: Any
) -> tuple[Path, dict[str, Any]]:
    config = replace(config, carve=CarveConfig(**carve))
    context = context_of(tmp_path, dense, statistics, config)
    metrics = CarveStage().run(context)
    assert list(context.work.iterdir()) == []
    return context.folder, metrics


def test_folder_holds_the_parent_and_its_blocks(tmp_path: Path, tiny_checkpoint: Make) -> None:
    dense = tiny_checkpoint("llama", ffn=67)
    folder, _ = carve(tmp_path, dense, fake_statistics(tmp_path / "statistics", dense))
    expected = {path.name for path in dense.iterdir()} | {"dynaconv.json", "dynaconv.safetensors"}
    assert {path.name for path in folder.iterdir()} == expected
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (dense / name).read_bytes()
    layout = Layout.load(folder)
    assert layout.partition.edges == (0, 16, 32, 48, 67) and layout.layers == 2 and layout.dial is None
    assert (layout.ffn.path, layout.ffn.gate) == ("model.layers.{layer}.mlp", "gate_proj")
    assert (layout.router.kind, layout.router.linear, layout.router.rank) == ("curve", True, 0)


def test_shards_are_bounded(tmp_path: Path, tiny_checkpoint: Make) -> None:
    dense = tiny_checkpoint("qwen2")
    folder, _ = carve(tmp_path, dense, fake_statistics(tmp_path / "statistics", dense), shard_bytes=100_000)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 110_000 for shard in shards)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(read_tensors(dense / "model.safetensors"))


def test_routers_are_the_ridge_solution(tmp_path: Path, tiny_checkpoint: Make) -> None:
    dense = tiny_checkpoint("mistral")
    statistics = fake_statistics(tmp_path / "statistics", dense)
    folder, _ = carve(tmp_path, dense, statistics, ridge=0.5)
    routers, sums = read_tensors(folder / "dynaconv.safetensors"), read_tensors(statistics / "statistics.safetensors")
    assert len(routers) == 4
    for layer in range(2):
        weight, bias = solve_ridge(*(sums[f"layers.{layer}.{n}"] for n in ("feature_gram", "feature_target")), 0.5)
        assert torch.equal(routers[f"layers.{layer}.router.linear.weight"], weight.float())
        assert torch.equal(routers[f"layers.{layer}.router.linear.bias"], bias.float())
        assert weight.shape == (4, 64) and bias.shape == (4,)


def test_scores_of_routed_blocks_are_the_ridge_solution_less_the_layers_mean(
    tmp_path: Path, tiny_checkpoint: Make
) -> None:
    source = tiny_checkpoint()
    config = RunConfig(experts="routed", block_size=12)
    statistics = fake_statistics(tmp_path / "statistics", source, config)
    folder, _ = carve(tmp_path, source, statistics, config)
    layout, routers = Layout.load(folder), read_tensors(folder / "dynaconv.safetensors")
    assert (layout.router.kind, layout.router.linear) == ("linear", True)
    known = read_tensors(statistics / "statistics.safetensors")
    for layer in range(layout.layers):
        gram, target = (known[f"layers.{layer}.feature_{name}"] for name in ("gram", "target"))
        weight, bias = solve_ridge(gram, target, 1e-3)
        torch.testing.assert_close(routers[f"layers.{layer}.router.linear.weight"], weight.float())
        expected = bias - (target[-1] / gram[-1, -1]).double().mean()
        torch.testing.assert_close(routers[f"layers.{layer}.router.linear.bias"], expected.float())


def test_metrics_count_what_happened(tmp_path: Path, tiny_checkpoint: Make) -> None:
    dense = tiny_checkpoint("llama")
    statistics = fake_statistics(tmp_path / "statistics", dense)
    tensors = read_tensors(statistics / "statistics.safetensors")
    swapped = torch.arange(96)
    swapped[[0, 50]] = swapped[[50, 0]]
    for layer in range(2):
        importance = torch.ones(96)
        importance[swapped[:48]] = 3
        tensors[f"layers.{layer}.order"] = swapped
        tensors[f"layers.{layer}.importance"] = importance
    write_tensors(statistics / "statistics.safetensors", tensors)
    _, metrics = carve(tmp_path, dense, statistics)
    assert metrics == {
        "layers": 2,
        "blocks": 4,
        "block_size": 32,
        "neurons_moved": 4,
        "importance_of_first_half": pytest.approx(0.75),
    }
    json.dumps(metrics)


@pytest.mark.parametrize(
    "change", [{"schema": 1}, {"experts": "routed"}, {"layers": 3}, {"partition": {"edges": [0, 24, 48, 72, 96]}}]
)
def test_statistics_of_something_else_are_stale(tmp_path: Path, tiny_checkpoint: Make, change: dict[str, Any]) -> None:
    dense = tiny_checkpoint()
    statistics = fake_statistics(tmp_path / "statistics", dense)
    summary = read_json(statistics / "statistics.json")
    write_json(statistics / "statistics.json", {**summary, **change})
    field = next(iter(change))
    with pytest.raises(StaleArtifactError, match=f"expected: {field}[\\s\\S]*redo profile"):
        carve(tmp_path, dense, statistics)


def test_an_order_that_loses_a_neuron_is_refused(tmp_path: Path, tiny_checkpoint: Make) -> None:
    dense = tiny_checkpoint()
    statistics = fake_statistics(tmp_path / "statistics", dense)
    tensors = read_tensors(statistics / "statistics.safetensors")
    tensors["layers.1.order"][3] = tensors["layers.1.order"][4]
    write_tensors(statistics / "statistics.safetensors", tensors)
    with pytest.raises(ArtifactError, match="order of layer 1 is not a permutation"):
        carve(tmp_path, dense, statistics)


@pytest.mark.parametrize("name", ["statistics.json", "statistics.safetensors"])
def test_missing_statistics_are_named(tmp_path: Path, tiny_checkpoint: Make, name: str) -> None:
    dense = tiny_checkpoint()
    statistics = fake_statistics(tmp_path / "statistics", dense)
    (statistics / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        carve(tmp_path, dense, statistics)


def test_nan_in_a_weight_is_named(tmp_path: Path, tiny_checkpoint: Make) -> None:
    dense = tiny_checkpoint()
    tensors = read_tensors(dense / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][5, 7] = torch.nan
    write_tensors(dense / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight has values that are not"):
        carve(tmp_path, dense, fake_statistics(tmp_path / "statistics", dense))


def test_estimate_says_the_bytes_that_are_written(tmp_path: Path, tiny_checkpoint: Make) -> None:
    dense = tiny_checkpoint("qwen3", tied=True)
    config = RunConfig(experts="nested", blocks=4)
    estimate = CarveStage().estimate(config, dense)
    folder, _ = carve(tmp_path, dense, fake_statistics(tmp_path / "statistics", dense))
    written = sum(path.stat().st_size for path in folder.iterdir())
    assert estimate.disk_bytes == pytest.approx(written, rel=0.03)
    assert estimate.notes == ("2 FFNs of 96 neurons in 4 blocks of 16 or 32",)
    with pytest.raises(ConfigError, match="blocks is 40, but the FFNs have 27"):
        CarveStage().estimate(RunConfig(experts="nested", blocks=40), tiny_checkpoint(ffn=27))


def test_the_peak_is_the_largest_reordered_tensor_not_the_checkpoint(tiny_checkpoint: Make) -> None:
    """Twice the layers cost no more than their routers; twice the neurons cost twice the largest tensor."""
    stage, config = CarveStage(), RunConfig(experts="nested", blocks=4)
    two, four = (stage.estimate(config, tiny_checkpoint(ffn=4096, layers=n)).peak_bytes for n in (2, 4))
    wide = stage.estimate(config, tiny_checkpoint(ffn=8192)).peak_bytes
    by_layer = 2 * (4 * 4 * 65 + 8 * 4096)
    assert four - two == by_layer
    assert wide - two == 2 * (4096 * 64 * 4) + 2 * 8 * 4096
