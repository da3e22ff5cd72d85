"""The embedded base: it learns, the same twice, leaves held-out text alone, and its cache survives being killed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.artifacts.files import sha256
from dynaconv.config import DataConfig
from dynaconv.data.split import split_documents
from dynaconv.data.tokenizer import load_tokenizer
from dynaconv.errors import ArtifactError, ConfigError, DataError
from dynaconv.progress import Progress
from dynaconv.threads import ThreadCount, Work
from dynaconv.train import defaults
from dynaconv.train.pretrain import Pretraining, Schedule, pretrain, rate
from dynaconv.train.shape import Shape, train_tokenizer, training_text

QUIET = Progress(quiet=True)
MICRO = Shape(hidden=32, ffn=64, layers=2, heads=2, kv_heads=1, vocabulary=300, positions=64)
SHORT = Schedule(tokens=8192, batch_size=4, warmup_share=0.1, learning_rate=1e-2, validation_tokens=2048, threads=1)


@pytest.fixture
def settings(text_file: Path) -> Pretraining:
    return Pretraining(MICRO, SHORT, DataConfig(train=[str(text_file)], sequence_length=64))


def test_it_learns_and_twice_gives_the_same_bytes(settings: Pretraining, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = pretrain(tmp_path / "a", settings, QUIET)
    torch.manual_seed(2)
    second = pretrain(tmp_path / "b", settings, QUIET)
    untrained = dataclasses.replace(settings, schedule=dataclasses.replace(SHORT, tokens=1))
    start = pretrain(tmp_path / "c", untrained, QUIET)
    assert first["validation_loss"] < start["validation_loss"] - 0.5
    assert first["validation_loss"] == second["validation_loss"]
    for name in (
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        assert sha256(tmp_path / "a" / name) == sha256(tmp_path / "b" / name), name
    assert sha256(tmp_path / "a" / "model.safetensors") != sha256(tmp_path / "c" / "model.safetensors")


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "opt"])
def test_other_families_learn_and_convert(family: str, settings: Pretraining, tmp_path: Path) -> None:
    shape = dataclasses.replace(MICRO, family=family, kv_heads=2)
    schedule = dataclasses.replace(SHORT, tokens=4096, validation_tokens=512)
    made = pretrain(tmp_path / "base", dataclasses.replace(settings, shape=shape, schedule=schedule), QUIET)
    untrained = dataclasses.replace(settings, shape=shape, schedule=dataclasses.replace(schedule, tokens=1))
    assert made["validation_loss"] < pretrain(tmp_path / "start", untrained, QUIET)["validation_loss"] - 0.3
    checkpoint = Checkpoint.open(tmp_path / "base")
    assert checkpoint.family.model_type == family
    assert (checkpoint.layers, checkpoint.sizes["ffn"], checkpoint.sizes["residual"]) == (2, 64, 32)


def test_two_threads_give_the_same_bytes_too(settings: Pretraining, tmp_path: Path) -> None:
    two = dataclasses.replace(
        settings, schedule=dataclasses.replace(SHORT, tokens=512, validation_tokens=256, threads=2)
    )
    for name in "ab":
        pretrain(tmp_path / name, two, QUIET)
    assert len({sha256(tmp_path / name / "model.safetensors") for name in "ab"}) == 1
    assert torch.get_num_threads() == 1  # as the tests set it


def test_the_folder_is_a_checkpoint_that_stock_tools_load(settings: Pretraining, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    measured = pretrain(tmp_path / "base", settings, QUIET)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == measured["parameters"]
    tokenizer = load_tokenizer(tmp_path / "base")
    text = "def naïve():\n\treturn '漢'  # tabs and bytes\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer("def ", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    record = json.loads((tmp_path / "base" / "pretraining.json").read_text())
    assert record["measured"]["validation_loss"] == measured["validation_loss"]
    assert record["settings"]["shape"] == dataclasses.asdict(MICRO)
    assert f"{measured['validation_loss']:.4f}" in (tmp_path / "base" / "README.md").read_text()


def test_held_out_documents_are_not_in_the_pretraining_text() -> None:
    data = DataConfig()
    held_out = {document.text for held, document in split_documents(data) if held}
    assert len(held_out) > 5
    assert not held_out & set(training_text(data))


def test_accumulation_changes_no_more_than_rounding(settings: Pretraining, tmp_path: Path) -> None:
    whole = pretrain(tmp_path / "whole", settings, QUIET)
    parts = dataclasses.replace(settings, schedule=dataclasses.replace(SHORT, accumulation=3))
    assert pretrain(tmp_path / "parts", parts, QUIET)["validation_loss"] == pytest.approx(
        whole["validation_loss"], abs=1e-3
    )


def test_padded_documents_train_too(text_file: Path, tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    lines = text_file.read_text().splitlines()
    records.write_text("\n".join(json.dumps({"text": "\n".join(lines[i : i + 3])}) for i in range(0, 3000, 3)))
    data = DataConfig(train=[str(records)], sequence_length=64, pack=False)
    measured = pretrain(tmp_path / "base", Pretraining(MICRO, SHORT, data), QUIET)
    assert measured["validation_loss"] < 5.0


def test_the_learning_rate_rises_stays_and_falls() -> None:
    schedule = Schedule(warmup_share=0.1, decay_share=0.4)
    factors = [rate(step, 100, schedule) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:60] == [1.0] * 50
    assert factors[60:] == sorted(factors[60:], reverse=True)
    assert 0 < factors[-1] < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 33}, "multiple of heads"),
        ({"kv_heads": 3, "heads": 4}, "multiple of kv_heads"),
        ({"layers": 0, "ffn": 0}, "2 mistakes"),
        ({"vocabulary": 100}, "256 bytes"),
        ({"family": "opt"}, "kv_heads"),
        ({"family": "bert"}, "llama, qwen3, gpt2, opt"),
    ],
)
def test_sizes_that_cannot_be(settings: Pretraining, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    wrong = dataclasses.replace(settings, shape=dataclasses.replace(MICRO, **change))
    with pytest.raises(ConfigError, match=message):
        pretrain(tmp_path / "base", wrong, QUIET)
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_for_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 100)
    with pytest.raises(DataError, match=r"vocabulary[\s\S]*300 tokens"):
        train_tokenizer(DataConfig(train=[str(tmp_path)]), MICRO)


def test_an_existing_folder_is_left_alone(settings: Pretraining, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(ArtifactError, match="exists"):
        pretrain(tmp_path / "base", settings, QUIET)


def test_the_cache_is_reused_and_keyed(settings: Pretraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNACONV_CACHE", str(tmp_path))
    folder = defaults.default_source(QUIET, settings)
    assert folder.parent == tmp_path
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert defaults.default_source(QUIET, settings) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    other = dataclasses.replace(settings, schedule=dataclasses.replace(SHORT, tokens=512))
    assert defaults.default_source(QUIET, other) != folder


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DYNACONV_CACHE", str(tmp_path / "mine"))
    assert defaults.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("DYNACONV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert defaults.cache_folder() == tmp_path / "xdg" / "dynaconv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert defaults.cache_folder() == Path.home() / ".cache" / "dynaconv"


def test_threads_are_chosen_for_the_shape_said_and_no_part_of_the_key(
    settings: Pretraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DYNACONV_CACHE", str(tmp_path))
    asked: list[Work] = []
    used: list[int] = []

    def choose(work: Callable[[], Work]) -> ThreadCount:
        asked.append(work())
        return ThreadCount(2, "2 CPU threads: twice as fast as 1")

    def train(*arguments: Any) -> dict[str, Any]:
        used.append(torch.get_num_threads())
        return {"parameters": 0, "tokens": 0}

    monkeypatch.setattr("dynaconv.train.pretrain.choose", choose)
    monkeypatch.setattr("dynaconv.train.pretrain._train", train)
    monkeypatch.setattr("dynaconv.train.pretrain.held_out_loss", lambda *arguments: 0.0)
    free = dataclasses.replace(settings, schedule=dataclasses.replace(SHORT, tokens=256, threads=None))
    folder = defaults.default_source(Progress(), free)
    assert asked == [Work(tokens=4 * 64, hidden=32, ffn=64)]
    assert used == [2]
    assert torch.get_num_threads() == 1
    assert "2 CPU threads: twice as fast as 1" in capsys.readouterr().err
    monkeypatch.setattr("dynaconv.train.pretrain.choose", lambda work: pytest.fail("trained again"))
    assert defaults.default_source(QUIET, free) == folder


def test_the_script_makes_a_base_of_any_shape(text_file: Path, tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "scripts" / "pretrain_base.py"
    shape = "--hidden 32 --layers 1 --heads 2 --kv-heads 1 --ffn 64 --vocabulary 300 --positions 64 --untied"
    run = f"--tokens 1e3 --sequence-length 32 --accumulation 2 --dtype bf16 --device cpu --threads 1 --data {text_file}"
    command = [sys.executable, str(script), "--out", str(tmp_path / "base"), *shape.split(), *run.split()]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "held-out loss" in made.stderr
    assert "shards" not in made.stderr  # the library's own progress bars stay silent
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"], config["tie_word_embeddings"]) == (32, 64, False)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == ArtifactError.exit_code
    assert "Traceback" not in again.stderr


CHILD = """
import sys
from dynaconv.config import DataConfig
from dynaconv.progress import Progress
from dynaconv.train import defaults, pretrain
from dynaconv.train.pretrain import Pretraining, Schedule, Shape
shape = Shape(hidden=32, ffn=64, layers=2, heads=2, kv_heads=1, vocabulary=300, positions=64)
schedule = Schedule(tokens=512, batch_size=4, validation_tokens=512, threads=1)
settings = Pretraining(shape, schedule, DataConfig(train=[sys.argv[1]], sequence_length=64))
if sys.argv[2] == "hang":  # in the middle of writing
    import time
    pretrain.fsync_tree = lambda folder: (print("writing", flush=True), time.sleep(60))
print(defaults.default_source(Progress(quiet=True), settings), flush=True)
"""


def child(text: Path, cache: Path, *, hang: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(text), "hang" if hang else "go"]
    environment = {**os.environ, "DYNACONV_CACHE": str(cache)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_killed_attempt_leaves_nothing_that_counts(settings: Pretraining, text_file: Path, tmp_path: Path) -> None:
    killed = child(text_file, tmp_path, hang=True)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "writing\n"
    waiting = child(text_file, tmp_path)  # finds the lock held
    time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    printed, _ = waiting.communicate(timeout=120)
    folder = Path(printed.strip())
    assert (folder / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([folder.name, f".{folder.name}.lock"])


def test_an_unwritable_cache_says_what_to_set(
    settings: Pretraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DYNACONV_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ArtifactError, match="DYNACONV_CACHE"):
        defaults.default_source(QUIET, settings)
