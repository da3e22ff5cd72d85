"""A plan tells all that can be told without running, and writes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from fake_stages import FAKES, USUAL, FakeStage, make_config, make_source

from dynaconv.artifacts.run import Run
from dynaconv.config import RunConfig
from dynaconv.errors import CheckpointError
from dynaconv.pipeline import registry
from dynaconv.pipeline.plan import as_json, make_plan
from dynaconv.pipeline.runner import run_pipeline
from dynaconv.pipeline.stage import INTERPRETER_BYTES
from dynaconv.progress import Progress


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(registry, "STAGES", FAKES)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power fails here
    return make_source(tmp_path / "model")


@pytest.fixture
def config(source: Path) -> RunConfig:
    return make_config(source)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


def actions(config: RunConfig, run: Run | None, source: Path, **settings: str) -> dict[str, str]:
    plan = make_plan(config, run, source, **settings)
    assert plan.problems == ()
    return {stage.name: stage.action for stage in plan.stages}


def test_new_run(config: RunConfig, source: Path) -> None:
    before = tree(source.parent)
    plan = make_plan(config, None, source)
    assert [stage.folder for stage in plan.stages] == [f"{i + 1:02}-{name}" for i, name in enumerate(USUAL)]
    assert {stage.action for stage in plan.stages} == {"make"}
    assert plan.peak_bytes == INTERPRETER_BYTES + 1000
    assert plan.disk_bytes == 50
    assert plan.flops == 25
    assert plan.exit_code == 0
    assert tree(source.parent) == before
    json.dumps(as_json(plan))


def test_what_is_kept_made_stale_and_damaged(config: RunConfig, source: Path, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    run_pipeline(config, run, until="finetune", progress=Progress(quiet=True))
    run = Run.open(run.path)
    before = tree(tmp_path)
    kept = {"profile": "keep", "carve": "keep", "finetune": "keep", "calibrate": "make", "export": "make"}
    assert actions(config, run, source) == kept
    assert make_plan(config, run, source).disk_bytes == 20
    assert actions(config, run, source, until="carve") == {"profile": "keep", "carve": "keep"}
    assert actions(config, run, source, redo="carve") == {**kept, "carve": "make", "finetune": "make"}
    config.carve.ridge = 0.5
    assert actions(config, run, source) == {**kept, "carve": "stale", "finetune": "stale"}
    reasons = {stage.name: stage.reasons for stage in make_plan(config, run, source).stages}
    assert reasons["carve"] == ("carve.ridge: 0.001 -> 0.5",)
    assert reasons["finetune"][0].startswith("inputs.dynamic: carve:")
    config.carve.ridge = 0.001
    assert tree(tmp_path) == before
    (run.path / "02-carve" / "part-0.bin").write_bytes(b"short")
    assert actions(config, run, source) == {**kept, "carve": "damaged"}


def test_source_and_text_that_changed_are_named(config: RunConfig, source: Path, tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    run_pipeline(config, run, until="carve", progress=Progress(quiet=True))
    (tmp_path / "other.txt").write_text("other text\n" * 50)
    config.data.train = [str(tmp_path / "other.txt")]
    plan = make_plan(config, run, source, until="profile")
    text = "\n".join(plan.stages[0].reasons)
    assert "data.content: " in text
    assert "other.txt" in text
    config.data.train = [str(tmp_path / "text.txt")]
    (source / "config.json").write_text('{"changed": 1}')
    plan = make_plan(config, run, source, until="profile")
    (reason,) = plan.stages[0].reasons
    assert reason.startswith("inputs.dense: source:")


def test_every_mistake_at_once(config: RunConfig, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FakeStage, config: RunConfig, source: Path, parent: Path) -> None:
        raise CheckpointError("unknown architecture")

    monkeypatch.setattr(FakeStage, "estimate", refuse)
    config.stages = ["carve", "crave", "calibrate"]
    config.seed = -1
    config.calibrate.budgets = [0.01 * i for i in range(1, 100)]
    config.data.train = ["/no/such/file.txt"]
    plan = make_plan(config, None, source, until="finetune")
    text = "\n".join(plan.problems)
    for words in ("seed is -1", "no stage 'crave'", "calibrate.budgets: too many", "--until finetune", "unknown arch"):
        assert words in text
    assert plan.exit_code == 2
    config.stages = ["carve", "calibrate"]
    text = "\n".join(make_plan(config, None, source).problems)
    assert "carve needs statistics" in text
    assert "seed is -1" in text


def test_a_mistake_in_the_checkpoint_has_its_own_exit_code(
    config: RunConfig, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FakeStage, config: RunConfig, source: Path, parent: Path) -> None:
        raise CheckpointError("unknown architecture")

    monkeypatch.setattr(FakeStage, "estimate", refuse)
    plan = make_plan(config, None, source)
    assert plan.problems == ("unknown architecture",)  # every stage says so, it is told once
    assert plan.exit_code == 3


def test_missing_text_is_told(config: RunConfig, source: Path) -> None:
    config.data.train = ["/no/such/file.txt"]
    plan = make_plan(config, None, source)
    assert len(plan.problems) == 1
    assert "/no/such/file.txt" in plan.problems[0]
    assert plan.exit_code == 2


def test_redo_after_until_is_a_mistake(config: RunConfig, source: Path) -> None:
    plan = make_plan(config, None, source, until="carve", redo="finetune")
    assert plan.problems == ("--redo finetune comes after --until carve: nothing would be redone",)


def test_too_little_memory_and_disk_are_warned_of(
    config: RunConfig, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynaconv.pipeline.plan.available_bytes", lambda: 1000)
    monkeypatch.setattr("dynaconv.pipeline.plan.free_bytes", lambda path: 49)
    memory, disk = make_plan(config, None, source).warnings
    assert "1.0 kB are available" in memory
    assert "needs 50 B on disk; 49 B are free" in disk
