"""SIGKILL in every stage of a real run, at instants drawn at random: the tensors come out the same to the bit."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import convert, documents_file, tensor_hashes, tiny_config

from dynaconv.config import RunConfig

Maker = Callable[..., Path]


def start(config: RunConfig, path: Path) -> int:
    """The run in a child process that shares this one's imports; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        convert(config, path)
    finally:
        os._exit(0)


def wait_for(path: Path, pattern: str, child: int) -> bool:
    """Waits until something matches; false when the child ended first."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(path.glob(pattern)):
            return True
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    raise TimeoutError(pattern)


def kill(child: int) -> bool:
    """SIGKILL; false when the child had ended already."""
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_in_the_middle_of_training_it_goes_on_from_the_saved_state(
    tiny_checkpoint: Maker, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    config = tiny_config(tiny_checkpoint("llama"), documents_file(tmp_path, text_file))
    config.finetune.tokens *= 10  # 120 steps, a state every second: long enough to be caught in between
    convert(config, tmp_path / "whole", until="finetune")
    run = tmp_path / "killed"
    convert(config, run, until="carve")
    child = start(config, run)
    assert wait_for(run, ".work/*finetune/state-*", child)
    assert kill(child), "training was over before it could be killed"
    saved = [path.name for path in run.glob(".work/*finetune/state-*")]
    convert(config, run, until="finetune")
    assert saved, "no state to go on from"
    assert "resuming after step" in (run / "logs" / "finetune.log").read_text(encoding="utf-8")
    assert tensor_hashes(run) == tensor_hashes(tmp_path / "whole")


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_in_every_stage_the_bytes_are_the_same(
    tiny_checkpoint: Maker, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    config = tiny_config(tiny_checkpoint("llama"), documents_file(tmp_path, text_file))
    convert(config, tmp_path / "whole")
    expected = tensor_hashes(tmp_path / "whole")
    run, chance, killed = tmp_path / "killed", random.Random(seed), []
    for stage in ("profile", "carve", "finetune", "finetune", "finetune", "calibrate", "export"):
        child = start(config, run)
        if not wait_for(run, f".staging-*{stage}", child):
            continue  # a fast machine got past this stage between two looks
        time.sleep(chance.uniform(0.0, 0.4) if stage == "finetune" else chance.uniform(0.0, 0.1))
        if kill(child):
            killed.append(stage)
    assert killed, "nothing was killed"
    outcomes = convert(config, run)
    assert [outcome.name for outcome in outcomes] == config.stages
    assert tensor_hashes(run) == expected
    assert not list(run.glob(".staging-*")), "something half-made was left behind"
