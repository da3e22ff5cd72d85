"""A run folder: begun, locked, verified; nothing of the user's is ever taken for ours."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fake_stages import sample_record as record
from small_disk import remount, small_disk

from dynaconv.artifacts.run import MadeFor, Run
from dynaconv.errors import ArtifactError, LockedRunError

HOLD = """
import sys
from dynaconv.artifacts.run import Run
with Run.open(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def staged(run: Run, content: bytes = b"result", folder: str = "02-carve", **changes: object):
    """Stages one file and returns its record."""
    path = run.new_staging(folder)
    (path / "deep").mkdir()
    (path / "deep" / "file.bin").write_bytes(content)
    (path / "dial.json").write_text("{}")
    return replace(record(folder=folder), outputs=run.outputs(folder), **changes)


def test_create_then_open(tmp_path: Path) -> None:
    created = Run.create(tmp_path / "runs" / "new")
    assert Run.open(created.path).manifest == created.manifest
    assert Run.create(created.path).manifest == created.manifest


def test_only_a_new_empty_or_own_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="not a run"):
        Run.create(tmp_path)
    with pytest.raises(ArtifactError, match="not a run"):
        Run.create(tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_opening_what_is_no_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ArtifactError, match="dynaconv convert"):
            Run.open(path)


def test_publish_records_verifies_and_clears_up(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    with run.lock():
        (run.work("02-carve", MadeFor("abc")) / "state").write_text("x")
        published = staged(run)
        run.publish(published)
    again = Run.open(run.path)
    assert again.manifest.stages == [published]
    assert [output.path for output in published.outputs] == ["deep/file.bin"]  # dial.json may change later
    assert again.damage(published, full=True) is None
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", ".work", "02-carve", "manifest.json"]
    assert list((run.path / ".work").iterdir()) == []


def test_damage_names_the_file(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    published = staged(run)
    run.publish(published)
    path = run.path / "02-carve" / "deep" / "file.bin"
    path.write_bytes(b"RESULT")
    assert run.damage(published, full=False) is None
    assert "file.bin has the right size but other content" in str(run.damage(published, full=True))
    path.write_bytes(b"resul")
    assert "has 5 bytes, not 6" in str(run.damage(published, full=False))
    path.unlink()
    assert "is missing" in str(run.damage(published, full=False))


def test_a_new_result_replaces_the_old_and_follows_its_number(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    run.publish(staged(run, b"first"))
    run.publish(staged(run, b"second", fingerprint="other"))
    assert (run.path / "02-carve" / "deep" / "file.bin").read_bytes() == b"second"
    run.publish(staged(run, b"third", folder="03-carve"))
    assert [path.name for path in run.path.glob("0*")] == ["03-carve"]
    assert [found.folder for found in run.manifest.stages] == ["03-carve"]
    assert not list(run.path.glob(".old-*"))


def test_a_folder_nobody_recorded_is_kept(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    (run.path / "02-carve").mkdir()
    (run.path / "02-carve" / "notes.txt").write_text("mine")
    run.publish(staged(run))
    assert (run.path / "02-carve.unknown-1" / "notes.txt").read_text() == "mine"
    assert (run.path / "02-carve" / "deep" / "file.bin").read_bytes() == b"result"


def test_superseded_marks_others(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    run.publish(staged(run, folder="03-finetune", stage="finetune"))
    run.publish(staged(run), superseded=["finetune"])
    assert {found.stage: found.superseded for found in run.manifest.stages} == {"carve": False, "finetune": True}


def test_work_survives_for_the_same_settings_only(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    one = MadeFor("one", {"finetune.tokens": 1}, {"finetune": {"tokens": 1}})
    assert run.unfinished("03-finetune") is None
    assert not run.begun
    work = run.work("03-finetune", one)
    assert run.unfinished("03-finetune") is None  # nothing to lose yet
    (work / "state").write_text("half way")
    assert (run.work("03-finetune", one) / "state").read_text() == "half way"
    assert run.unfinished("03-finetune") == one
    assert run.was_interrupted("03-finetune")
    assert run.begun
    assert not (run.work("03-finetune", MadeFor("two")) / "state").exists()
    assert not run.was_interrupted("02-carve")


def test_second_process_is_refused_and_told_who(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run")
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert run.locked_by() is not None
        before = sorted(path.name for path in run.path.iterdir())
        with pytest.raises(LockedRunError, match=f"pid {other.pid}"), run.lock():
            pytest.fail("two processes in one run")
        assert sorted(path.name for path in run.path.iterdir()) == before
        other.kill()
        other.wait()
        with run.lock():  # the kernel let go
            assert str(os.getpid()) in str(run.locked_by())
        assert run.locked_by() is None
    finally:
        other.kill()
        other.communicate()


def test_read_only_run_can_be_looked_at_but_not_worked_on(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        run = Run.create(disk / "run")
        published = staged(run)
        run.publish(published)
        remount(disk, "ro")
        looked = Run.open(run.path)
        assert looked.damage(published, full=True) is None
        assert looked.locked_by() is None
        with pytest.raises(ArtifactError, match="read-only"), looked.lock():
            pytest.fail("locked a read-only run")
        with pytest.raises(ArtifactError, match="read-only"):
            Run.create(disk / "another")
        remount(disk, "rw")
