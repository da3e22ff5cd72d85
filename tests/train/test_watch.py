"""Runs that cannot go on: they stop before damage is done, say what to change, and what was saved stays."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_models import SELF_TAUGHT, dynamic_model
from tiny_run import convert, documents_file, tensor_hashes, tiny_config

from dynaconv.artifacts.files import write_json
from dynaconv.artifacts.run import WORK_MARK, MadeFor
from dynaconv.config import FinetuneConfig, RunConfig
from dynaconv.data.windows import Windows
from dynaconv.errors import ConfigError, QualityError, StaleArtifactError
from dynaconv.pipeline.recipe import recipe_text
from dynaconv.ranks import Ranks
from dynaconv.train.engine import TorchEngine
from dynaconv.train.state import Position, load_state, save_state
from dynaconv.train.step import Trainer
from dynaconv.train.watch import FEWEST, Watch, ending, memory_errors

Maker = Callable[..., Path]
CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


def trainer(folder: Path, **settings: Any) -> Trainer:
    config = FinetuneConfig(batch_size=4, **(SELF_TAUGHT | settings))
    engine = TorchEngine(dynamic_model(folder), config, Ranks.single("cpu"))
    return Trainer(engine, config, Windows(torch.arange(1, 60).repeat(30).int(), 16), steps=8, seed=3)


def test_a_loss_far_above_the_last_ones_stops_the_run() -> None:
    watch = Watch(explosion=2.0)
    for _ in range(FEWEST):
        watch.check({"loss_full": 3.0}, "step", "batch")
    watch.check({"loss_full": 4.9}, "step", "batch")
    with pytest.raises(QualityError, match=r"exploded: 6.00 after 3.1[\s\S]*where: here[\s\S]*found: that") as caught:
        watch.check({"loss_full": 6.0}, "here", "that")
    assert "finetune.learning_rate" in str(caught.value) and caught.value.exit_code == 4


def test_the_first_steps_may_be_anything_but_no_number() -> None:
    watch = Watch(explosion=0.1)
    for loss in (3.0, 9.0):
        watch.check({"loss_dial": loss}, "step", "batch")
    with pytest.raises(QualityError, match="kl_dial is no longer a number"):
        watch.check({"loss_full": 3.0, "kl_dial": math.inf}, "step", "batch")


def test_a_run_that_goes_on_remembers_the_losses_so_far() -> None:
    with pytest.raises(QualityError, match="exploded"):
        Watch(2.0, [3.0] * FEWEST).check({"loss_full": 6.0}, "step", "batch")


def test_the_batch_is_named_and_nothing_is_changed_by_it(tiny_checkpoint: Maker) -> None:
    made = trainer(tiny_checkpoint())
    with torch.no_grad():
        made.engine.network.lm_head.weight[5] = math.nan
    before = {name: value.clone() for name, value in made.engine.network.state_dict().items()}
    with pytest.raises(
        QualityError, match=r"step 3 of 8[\s\S]*windows 8 to 11 of the training order that seed 3 draws"
    ):
        made.step(2)
    for name, value in made.engine.network.state_dict().items():
        assert torch.equal(value.nan_to_num(0.5), before[name].nan_to_num(0.5)), name


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (MemoryError(), True),
        (RuntimeError(CPU_MESSAGE), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error: Exception, known: bool) -> None:
    with pytest.raises(ConfigError if known else RuntimeError) as caught, memory_errors(RunConfig()):
        raise error
    assert (caught.value is not error) == known
    if known:
        assert "more memory than there is" in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "ranks", "said"),
    [
        ({}, 1, "finetune.accumulation=2 (now 1)"),
        ({"accumulation": 4}, 1, "finetune.accumulation=8 (now 4)"),
        ({"batch_size": 12, "accumulation": 3}, 1, "finetune.accumulation=6 (now 3)"),
        ({"accumulation": 8}, 2, "finetune.gradient_checkpointing=true"),
        ({"accumulation": 16}, 1, "finetune.gradient_checkpointing=true"),
        ({"accumulation": 16, "gradient_checkpointing": True}, 1, "finetune.trainable=lora"),
        ({"accumulation": 16, "gradient_checkpointing": True, "trainable": "lora"}, 1, "data.sequence_length=128"),
    ],
)
def test_the_setting_to_change_is_named(changes: dict[str, Any], ranks: int, said: str) -> None:
    config = RunConfig()
    config.finetune = replace(config.finetune, **({"batch_size": 16} | changes))
    with pytest.raises(ConfigError) as caught, memory_errors(config, ranks):
        raise MemoryError
    assert said in str(caught.value)


def test_a_stage_that_runs_out_of_memory_says_so(
    tiny_checkpoint: Maker, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_checkpoint(), documents_file(tmp_path, text_file))

    def fail(*args: Any) -> None:
        raise RuntimeError(CPU_MESSAGE)

    monkeypatch.setattr(TorchEngine, "backward", lambda self, loss, last: fail())
    with pytest.raises(ConfigError, match=r"4 windows of 32 tokens[\s\S]*finetune.accumulation=2"):
        convert(config, tmp_path / "run", until="finetune")


def test_a_state_from_elsewhere_is_refused_and_kept(tiny_checkpoint: Maker, tmp_path: Path) -> None:
    made, work = trainer(tiny_checkpoint()), tmp_path / "work"
    work.mkdir()
    write_json(work / WORK_MARK, asdict(MadeFor("a" * 64)))
    save_state(work, made.engine, Position(2))
    assert load_state(work, made.engine).step == 2
    write_json(work / WORK_MARK, asdict(MadeFor("b" * 64)))
    before = sorted((path, path.read_bytes()) for path in work.rglob("*") if path.is_file())
    with pytest.raises(StaleArtifactError, match=r"another run or other settings[\s\S]*b{12}[\s\S]*a{12}"):
        load_state(work, made.engine)
    assert sorted((path, path.read_bytes()) for path in work.rglob("*") if path.is_file()) == before


def test_a_signal_is_noted_and_the_handler_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ending() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
    assert signal.getsignal(signal.SIGTERM) is before
    found = []
    thread = threading.Thread(target=lambda: found.append(ending().__enter__()()))
    thread.start(), thread.join()
    assert found == [False]


def test_sigterm_saves_and_the_same_command_goes_on_to_the_same_end(
    tiny_checkpoint: Maker, tmp_path: Path, text_file: Path
) -> None:
    config = tiny_config(tiny_checkpoint(), documents_file(tmp_path, text_file))
    config.finetune.tokens, config.finetune.save_every = 150 * 4 * 32, 10_000  # a state only where it is asked for
    convert(config, tmp_path / "whole", until="finetune")
    run, recipe = tmp_path / "ended", tmp_path / "recipe.yaml"
    recipe.write_text("# Ended.\n" + recipe_text(config))
    command = [sys.executable, "-m", "dynaconv.cli.app", "convert", "--recipe", str(recipe), "--until", "finetune"]
    child = subprocess.Popen([*command, "--out", str(run)], stderr=subprocess.PIPE, text=True)
    while not any(path.stat().st_size for path in run.glob(".work/*finetune/metrics.jsonl")):
        assert child.poll() is None, child.stderr and child.stderr.read()
        time.sleep(0.01)
    child.terminate()
    _, said = child.communicate(timeout=120)
    assert child.returncode == 130, said
    assert "rerun the same command" in said and "Traceback" not in said
    (saved,) = run.glob(".work/*finetune/state-*")
    assert 0 < int(saved.name.removeprefix("state-")) < 150
    convert(config, run, until="finetune")
    assert tensor_hashes(run) == tensor_hashes(tmp_path / "whole")
    metrics = [next(folder.glob("[0-9]*finetune/metrics.jsonl")) for folder in (run, tmp_path / "whole")]
    assert metrics[0].read_text() == metrics[1].read_text()
