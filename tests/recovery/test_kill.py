"""Killed at any instant, a run finishes with the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_stages
import pytest
from fake_stages import FAKES, USUAL, FakeStage, contents, leftovers, make_config, make_source
from killing import killed_after

from dynaconv.artifacts.manifest import Manifest
from dynaconv.artifacts.run import Run
from dynaconv.config import RunConfig
from dynaconv.pipeline import registry
from dynaconv.pipeline.runner import run_pipeline, status
from dynaconv.progress import Progress

PAUSE = 0.01


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr(registry, "STAGES", FAKES)
    return make_config(make_source(tmp_path / "model"))


def go(config: RunConfig, path: Path, redo: str | None = None) -> None:
    run_pipeline(config, Run.create(path), redo=redo, progress=Progress(quiet=True))


def test_sigkill_at_random_instants(config: RunConfig, tmp_path: Path) -> None:
    go(config, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    run, kills = tmp_path / "run", 0
    chance = random.Random(1)
    command = [sys.executable, fake_stages.__file__, config.source, str(run), str(PAUSE)]
    for _ in range(12):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"  # imports take a while, there is nothing to kill before
        time.sleep(chance.uniform(0, 0.4))  # all pauses of a whole run take longer
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 2
    assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0
    assert contents(run) == expected
    assert leftovers(run) == []
    assert {row["status"] for row in status(Run.open(run))["stages"]} == {"done"}


class Killed(BaseException):
    """Stands in for SIGKILL: nothing after it may change the disk."""


@pytest.mark.parametrize("redo", [None, "calibrate"], ids=["first time", "redo with other settings"])
def test_killed_after_every_single_change_of_the_disk(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redo: str | None
) -> None:
    monkeypatch.setattr("fake_stages.STEPS", 1)
    monkeypatch.setattr("fake_stages.FILES", 1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    config.stages = ["profile", "carve", "calibrate"] if redo else ["profile", "carve"]
    begun = tmp_path / "begun"
    if redo is not None:
        go(config, begun)
        config.calibrate.tokens *= 2
        old = contents(begun)
    go(config, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    count, done = 0, False
    while not done:
        count += 1
        run = tmp_path / f"run-{count}"
        if redo is not None:
            shutil.copytree(begun, run)
        done = not killed_after(count, lambda run=run: go(config, run, redo))
        if redo is not None:  # neither the old nor the new result is ever half there
            recorded = Manifest.load(run)
            if recorded.publishing is None:
                with Run.open(run).lock():
                    pass
                found = contents(run)
                assert found in (expected, old)
        go(config, run, redo)
        assert contents(run) == expected, f"killed after call {count}"
        assert leftovers(run) == [], f"killed after call {count}"
    assert count > 20


def test_a_process_that_died_while_publishing_is_finished_not_repeated(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeStage, "calls", [])
    path = tmp_path / "run"

    def die(self: Run, folder: Path) -> None:
        if folder.name == "02-carve":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_set_aside", die)
        with pytest.raises(Killed):
            go(config, path)
    assert (path / ".staging-02-carve").is_dir()
    go(config, path)
    assert FakeStage.calls == USUAL
    assert leftovers(path) == []


def test_a_journal_whose_folder_vanished_is_dropped(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "run"
    go(config, path)
    whole = contents(path)
    run = Run.open(path)
    run.manifest.publishing = run.manifest.stages.pop()
    run.manifest.save(path)
    for file in (path / "05-export").rglob("*.bin"):
        file.write_bytes(b"half")
    with Run.open(path).lock():
        assert Run.open(path).manifest.publishing is None
    go(config, path)
    assert {name: value for name, value in contents(path).items() if "unknown" not in name} == whole
    assert (path / "05-export.unknown-1").is_dir()
