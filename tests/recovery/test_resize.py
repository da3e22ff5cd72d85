"""Resizing that is killed, or finds the disk full: the source stays, and the next try gives the same bytes."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
from conftest import make_checkpoint
from fake_stages import contents, leftovers
from killing import killed_after
from small_disk import remount, small_disk

from dynaconv.artifacts.run import Run
from dynaconv.artifacts.writer import CheckpointWriter
from dynaconv.config import RunConfig
from dynaconv.errors import ArtifactError
from dynaconv.pipeline.runner import run_pipeline
from dynaconv.progress import Progress
from dynaconv.recipes import compose

ROOM = {"hyperclone": "200k", "subclone": "136k"}  # enough for what comes before the weights


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "model", tied=True, heads=8, kv_heads=4)


def configuration(stage: str, source: Path, text: Path) -> RunConfig:
    overrides = {
        "hyperclone": ["hyperclone.factor=2", "hyperclone.layers=3", "hyperclone.shard_bytes=200000"],
        "subclone": ["subclone.ratio=0.5", "importance.tokens=256", "data.sequence_length=32", f"data={text}"],
    }
    config = compose(stage, overrides[stage])
    config.source = str(source)
    return config


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def go(config: RunConfig, path: Path) -> None:
    run_pipeline(config, Run.create(path), progress=Progress(quiet=True))


@pytest.mark.parametrize("stage", ["hyperclone", "subclone"])
def test_killed_at_random_instants_it_ends_with_the_same_bytes(
    stage: str, source: Path, text_file: Path, tmp_path: Path
) -> None:
    config, before = configuration(stage, source, text_file), digests(source)
    go(config, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    chance, kills = random.Random(stage), 0
    for number in range(6):
        run = tmp_path / f"run-{number}"
        kills += killed_after(
            chance.randrange(1, 40), lambda run=run: go(config, run), (CheckpointWriter, "write_rows")
        )
        go(config, run)
        assert contents(run) == expected
        assert leftovers(run) == []
    assert kills >= 4
    assert digests(source) == before


@pytest.mark.parametrize("stage", ["hyperclone", "subclone"])
def test_full_disk_leaves_the_source_and_says_what_is_needed(
    stage: str, source: Path, text_file: Path, tmp_path: Path
) -> None:
    config, before = configuration(stage, source, text_file), digests(source)
    with small_disk(tmp_path / "disk", ROOM[stage]) as disk:
        with pytest.raises(ArtifactError, match="disk is full") as caught:
            go(config, disk / "run")
        assert f"-{stage}" in str(caught.value.where), "it was not the resize that filled the disk"
        assert "bytes free" in str(caught.value.expected)
        assert not list((disk / "run").glob(".staging-*"))
        assert not list((disk / "run").glob(f"0?-{stage}"))
        assert digests(source) == before
        remount(disk, "size=64m")
        go(config, disk / "run")
        assert leftovers(disk / "run") == []
        go(config, tmp_path / "elsewhere")
        assert contents(disk / "run") == contents(tmp_path / "elsewhere")
