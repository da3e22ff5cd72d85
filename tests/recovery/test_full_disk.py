"""A disk that fills up or turns read-only under a stage: one clear error, the run intact, and it can go on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fake_stages import FAKES, USUAL, FakeStage, contents, leftovers, make_config, make_source
from small_disk import remount, small_disk

from dynaconv.artifacts.run import Run
from dynaconv.config import RunConfig
from dynaconv.errors import ArtifactError
from dynaconv.pipeline import registry
from dynaconv.pipeline.runner import run_pipeline
from dynaconv.progress import Progress


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr(registry, "STAGES", FAKES)
    monkeypatch.setattr(FakeStage, "calls", [])
    return make_config(make_source(tmp_path / "model"))


def go(config: RunConfig, path: Path, **settings: str) -> None:
    run_pipeline(config, Run.create(path), progress=Progress(quiet=True), **settings)


def test_full_disk_in_the_middle_of_a_stage(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk:
        run = disk / "run"
        go(config, run, until="carve")
        before, ledger = contents(run), (run / "manifest.json").read_text()
        monkeypatch.setattr(FakeStage, "file_bytes", 1_500_000)
        with pytest.raises(ArtifactError, match="disk is full"):
            go(config, run)
        assert contents(run) == before
        assert (run / "manifest.json").read_text() == ledger
        assert not list(run.glob(".staging-*"))
        assert (run / ".work" / "03-finetune" / "state.json").is_file()
        assert "Logging error" not in capsys.readouterr().err
        remount(disk, "size=64m")
        FakeStage.calls.clear()
        go(config, run)
        assert FakeStage.calls == USUAL[2:]
        assert leftovers(run) == []


@pytest.mark.parametrize("room", range(0, 60_000, 8_192))
def test_full_disk_at_any_point_of_a_redo(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """Whatever fills the disk, publishing included, the old result stands or the new one does."""
    with small_disk(tmp_path / "disk", "1m") as disk:
        run = disk / "run"
        go(config, run)
        old = contents(run)
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
        (disk / "filler").write_bytes(b"\0" * max(0, free - room))
        try:
            go(config, run, redo="export")
        except ArtifactError as error:
            assert "disk is full" in str(error)
        (disk / "filler").unlink()
        go(config, run)
        assert contents(run) == old
        assert leftovers(run) in ([], ["05-export"])  # resumable state of a redo that was given up is kept
        go(config, run, redo="export")
        assert leftovers(run) == []


def test_read_only_disk(config: RunConfig, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk:
        run = disk / "run"
        go(config, run, until="carve")
        before = contents(run)
        remount(disk, "ro")
        FakeStage.calls.clear()
        with pytest.raises(ArtifactError, match="read-only") as caught:
            go(config, run)
        assert "--out" in str(caught.value)
        assert FakeStage.calls == []
        assert contents(run) == before
        remount(disk, "rw")
        go(config, run)
        assert leftovers(run) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(config: RunConfig, tmp_path: Path) -> None:
    go(config, tmp_path / "run", until="carve")
    (tmp_path / "run").chmod(0o555)
    try:
        with pytest.raises(ArtifactError, match="denied"):
            go(config, tmp_path / "run")
    finally:
        (tmp_path / "run").chmod(0o755)
