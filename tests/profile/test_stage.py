"""The profile stage: what it writes, that it writes the same again, and what it says of bad input."""

import json
import logging
from pathlib import Path

import pytest
import torch

from dynaconv.arch.blocks import nested_partition
from dynaconv.artifacts.files import sha256
from dynaconv.artifacts.tensors import read_tensors
from dynaconv.config import DataConfig, ProfileConfig, RunConfig
from dynaconv.errors import CheckpointError, ConfigError, DataError, DynaconvError
from dynaconv.pipeline.stage import StageContext
from dynaconv.profile.stage import ProfileStage
from dynaconv.progress import Progress


def recipe(text: Path, **profile) -> RunConfig:
    settings = {"tokens": 2048, "batch_size": 8, **profile}
    data = DataConfig(train=[str(text)], sequence_length=64)
    return RunConfig(experts="nested", blocks=4, data=data, profile=ProfileConfig(**settings))


def run(config: RunConfig, source: Path, folder: Path) -> dict:
    folder.mkdir(parents=True)
    with Progress(quiet=True) as progress:
        context = StageContext(config, {"dense": source}, folder, folder / "work", progress, logging.getLogger("test"))
        return ProfileStage().run(context)


@pytest.mark.parametrize("loss_aware", [False, True])
def test_statistics_as_promised(loss_aware: bool, tiny_checkpoint, text_file: Path, tmp_path: Path) -> None:
    config = recipe(text_file, loss_aware=loss_aware)
    metrics = run(config, tiny_checkpoint(), tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "statistics.json").read_text())
    tensors = read_tensors(tmp_path / "out" / "statistics.safetensors")
    blocks, neurons, width = 4, 96, 64
    assert summary["tokens"] == metrics["tokens"] == 2048
    assert summary["curve_tokens"] == 2048 // 4 // 64 * 63  # the last token of a window predicts nothing
    assert metrics["curve_share"] == pytest.approx(summary["curve_tokens"] / 2048)
    assert (summary["layers"], summary["partition"]) == (2, nested_partition(96, 4).to_json())
    assert (summary["order"], summary["loss_aware"], summary["seed"]) == ("importance", loss_aware, 0)
    assert summary["loss"] == metrics["loss"]
    assert 4 < summary["loss"] < 12  # a random model over 257 tokens
    assert {name.split(".", 2)[2]: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "activation": (neurons,),
        "importance": (neurons,),
        "order": (neurons,),
        "curve_mean": (blocks + 1,),
        "curve_quantiles": (3, blocks + 1),
        "feature_gram": (width + 1, width + 1),
        "feature_target": (width + 1, blocks),
    }
    for layer in range(2):
        at = f"layers.{layer}."
        assert torch.equal(tensors[at + "order"].sort().values, torch.arange(neurons))
        assert bool((tensors[at + "importance"][tensors[at + "order"]].diff() <= 0).all())
        assert float(tensors[at + "feature_gram"][-1, -1]) == summary["curve_tokens"]
        assert float(tensors[at + "curve_mean"][0]) == 1.0
        assert float(tensors[at + "curve_mean"][-1]) == 0.0
        column = tensors[at + "feature_target"][:, 0].abs().max()
        assert bool(column > 0) == loss_aware  # log r_0 = 0; with the loss it is the weight's logarithm
    half = sum(float(tensors[f"layers.{layer}.curve_mean"][2]) for layer in range(2)) / 2
    assert metrics["half_width_error"] == pytest.approx(half)


@pytest.mark.parametrize("loss_aware", [False, True])
def test_the_same_again_is_the_same_bytes(loss_aware: bool, tiny_checkpoint, text_file, tmp_path: Path) -> None:
    source, config = tiny_checkpoint("qwen3", tied=True), recipe(text_file, loss_aware=loss_aware)
    for name in ("one", "two"):
        run(config, source, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["statistics.json", "statistics.safetensors"]
    assert [sha256(tmp_path / "one" / f) for f in files] == [sha256(tmp_path / "two" / f) for f in files]


def test_settings_change_what_they_name(tiny_checkpoint, text_file: Path, tmp_path: Path) -> None:
    source = tiny_checkpoint()
    run(recipe(text_file), source, tmp_path / "base")
    run(recipe(text_file, order="none"), source, tmp_path / "none")
    other_seed = recipe(text_file)
    other_seed.seed = 1
    run(other_seed, source, tmp_path / "seed")
    base, none, seed = (read_tensors(tmp_path / n / "statistics.safetensors") for n in ("base", "none", "seed"))
    assert torch.equal(none["layers.1.order"], torch.arange(96))
    assert torch.equal(none["layers.1.importance"], base["layers.1.importance"])
    assert not torch.equal(none["layers.1.curve_mean"], base["layers.1.curve_mean"])
    assert not torch.equal(seed["layers.0.curve_mean"], base["layers.0.curve_mean"])  # other windows


def test_documents_of_their_own_are_padded_and_masked(tiny_checkpoint, text_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, line in enumerate(text_file.read_text(encoding="utf-8").split("\n\n")[:120]):
        (folder / f"{i}.txt").write_text(line or "x", encoding="utf-8")
    config = recipe(folder, tokens=1000)
    config.data.pack = False
    run(config, tiny_checkpoint(), tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert 1000 <= summary["tokens"] < 1000 + 64


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda c: setattr(c, "blocks", 97), ConfigError, "have 96 neurons"),
        (lambda c: setattr(c.profile, "tokens", 10**9), DataError, "not enough training text"),
        (lambda c: setattr(c.data, "sequence_length", 1024), DataError, "sequences this long"),
    ],
)
def test_bad_input_is_refused(change, error: type[DynaconvError], words: str, tiny_checkpoint, text_file, tmp_path):
    config = recipe(text_file)
    change(config)
    with pytest.raises(error, match=words):
        run(config, tiny_checkpoint(), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_checkpoint_without_tokenizer_is_refused(tiny_checkpoint, text_file: Path, tmp_path: Path) -> None:
    source = tiny_checkpoint()
    for path in source.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        run(recipe(text_file), source, tmp_path / "out")


def test_estimate_scales_with_the_work(tiny_checkpoint, text_file: Path) -> None:
    stage, config, source = ProfileStage(), recipe(text_file), tiny_checkpoint()
    plain = stage.estimate(config, source)
    written = 2 * (4 * (96 * 2 + 5 + 15 + 65 * 65 + 65 * 4) + 8 * 96)
    assert plain.disk_bytes == written
    assert plain.peak_bytes > 4 * 64 * 2048  # at least the hidden states
    config.profile.loss_aware = True
    assert stage.estimate(config, source).flops > plain.flops
    config.profile.tokens *= 2
    assert stage.estimate(config, source).peak_bytes > plain.peak_bytes
