"""The writer accepts exactly its layout, and whatever goes wrong leaves nothing that looks like a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_disk import remount, small_disk

from dynaconv.artifacts.tensors import CheckpointReader, CheckpointWriter, read_tensors, write_tensors
from dynaconv.errors import ArtifactError

LAYOUT = [("a", torch.float32, (4, 3)), ("b", torch.bfloat16, (5,)), ("c", torch.int64, ())]


def write_all(writer: CheckpointWriter) -> None:
    for name, dtype, shape in LAYOUT:
        writer.write(name, torch.ones(shape, dtype=dtype))


def test_refuses_what_the_layout_does_not_say(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, LAYOUT) as writer:
        with pytest.raises(ArtifactError, match="does not fit"):
            writer.write("a", torch.ones(3, 4))
        with pytest.raises(ArtifactError, match="does not fit"):
            writer.write("a", torch.ones(4, 3, dtype=torch.float64))
        with pytest.raises(ArtifactError, match="no tensor d"):
            writer.write("d", torch.ones(1))
        for start in (-1, 3):
            with pytest.raises(ArtifactError, match="no such rows"):
                writer.write_rows("a", start, torch.ones(2, 3))
        with pytest.raises(ArtifactError, match="no such rows"):
            writer.write_rows("c", 0, torch.ones((), dtype=torch.int64))
        write_all(writer)
    assert torch.equal(CheckpointReader(tmp_path).read("a"), torch.ones(4, 3))


def test_each_row_exactly_once(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, LAYOUT) as writer:
        write_all(writer)
        with pytest.raises(ArtifactError, match="twice"):
            writer.write("b", torch.ones(5, dtype=torch.bfloat16))
        with pytest.raises(ArtifactError, match="twice"):
            writer.write_rows("a", 2, torch.zeros(1, 3))
    assert torch.equal(CheckpointReader(tmp_path).read("a"), torch.ones(4, 3))


@pytest.mark.parametrize("left_out", ["a", "b", "c", "row"])
def test_incomplete_is_refused_and_removed(tmp_path: Path, left_out: str) -> None:
    writer = CheckpointWriter(tmp_path, LAYOUT, shard_bytes=20)
    for name, dtype, shape in LAYOUT:
        if left_out == "row" and name == "a":
            writer.write_rows("a", 1, torch.ones(3, 3))
        elif name != left_out:
            writer.write(name, torch.ones(shape, dtype=dtype))
    with pytest.raises(ArtifactError, match=f"incomplete: {'a' if left_out == 'row' else left_out}"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_an_error_within_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path, LAYOUT, shard_bytes=20) as writer:
        writer.write("a", torch.ones(4, 3))
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_unfinished_files_do_not_look_like_a_checkpoint(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, LAYOUT, shard_bytes=20)
    write_all(writer)
    assert list(tmp_path.glob("*.safetensors")) == []
    writer.close()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    with pytest.raises(ArtifactError, match="closed"):
        writer.write("a", torch.ones(4, 3))


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, LAYOUT) as writer:
        write_all(writer)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ArtifactError, match="already here"):
        CheckpointWriter(tmp_path, LAYOUT)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_layouts_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="twice"):
        CheckpointWriter(tmp_path / "x", [LAYOUT[0], LAYOUT[0]])
    with pytest.raises(ArtifactError, match="cannot hold"):
        CheckpointWriter(tmp_path / "x", [("z", torch.complex64, (1,))])
    assert not (tmp_path / "x").exists()


def test_full_disk_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    layout = [("big", torch.float32, (1024, 1024))]
    with small_disk(tmp_path / "disk", "1m") as disk:
        with pytest.raises(ArtifactError, match="disk is full") as caught:
            CheckpointWriter(disk, layout)
        assert "4194" in str(caught.value)
        assert "bytes free" in str(caught.value)
        with pytest.raises(ArtifactError, match="disk is full"):
            write_tensors(disk / "x.safetensors", {"big": torch.zeros(1024, 1024)})
        assert list(disk.iterdir()) == []


def test_disk_that_fills_between_check_and_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynaconv.artifacts.writer.require_space", lambda path, needed: None)
    with small_disk(tmp_path / "disk", "1m") as disk:
        write_tensors(disk / "old.safetensors", {"small": torch.ones(3)})
        with pytest.raises(ArtifactError, match="disk is full"):
            CheckpointWriter(disk, [("big", torch.float32, (1024, 1024))], shard_bytes=100)
        with pytest.raises(ArtifactError, match="disk is full"):
            write_tensors(disk / "old.safetensors", {"big": torch.zeros(1024, 1024)})
        assert [path.name for path in disk.iterdir()] == ["old.safetensors"]
        assert torch.equal(read_tensors(disk / "old.safetensors")["small"], torch.ones(3))


def test_read_only_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        remount(disk, "ro")
        with pytest.raises(ArtifactError, match="read-only"):
            CheckpointWriter(disk, LAYOUT)
        with pytest.raises(ArtifactError, match="read-only"):
            write_tensors(disk / "x.safetensors", {"x": torch.zeros(1)})
