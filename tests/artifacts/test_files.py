"""Files are whole or absent, and what a disk can do comes out as one sentence."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from small_disk import remount, small_disk

from dynaconv.artifacts.files import (
    atomic_write,
    free_bytes,
    fsync_tree,
    read_json,
    replacing,
    sha256,
    size_text,
    storage_errors,
    write_json,
)
from dynaconv.errors import ArtifactError


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    atomic_write(path, "first")
    atomic_write(path, b"second \xff")
    assert path.read_bytes() == b"second \xff"
    assert [item.name for item in tmp_path.iterdir()] == ["x.txt"]


def test_an_error_while_replacing_keeps_the_old(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    atomic_write(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["x.txt"]


def test_full_disk_keeps_the_old(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        write_json(disk / "x.json", {"old": 1})
        with pytest.raises(ArtifactError, match="disk is full") as caught:
            atomic_write(disk / "x.json", "y" * 200_000)
        assert "200000 bytes free" in str(caught.value)
        assert read_json(disk / "x.json") == {"old": 1}
        assert [item.name for item in disk.iterdir()] == ["x.json"]


def test_read_only_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        remount(disk, "ro")
        with pytest.raises(ArtifactError, match="read-only"):
            atomic_write(disk / "x", "y")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "disk is full"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "denied"),
        (errno.EPERM, "denied"),
        (errno.EIO, "disk failed"),
    ],
)
def test_translation(tmp_path: Path, number: int, words: str) -> None:
    with pytest.raises(ArtifactError, match=words) as caught, storage_errors(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "victim"))
    assert "victim" in str(caught.value)


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError), storage_errors(tmp_path):
        raise ConnectionResetError(errno.ECONNRESET, "reset")


def test_json(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": [1, 2.5], "a": "é"})
    assert (tmp_path / "x.json").read_text().index('"a"') < (tmp_path / "x.json").read_text().index('"b"')
    assert read_json(tmp_path / "x.json") == {"a": "é", "b": [1, 2.5]}
    with pytest.raises(ArtifactError, match=r"y\.json is missing"):
        read_json(tmp_path / "y.json")
    for damaged in (b'{"a": ', b"\xff\xfe", b""):
        (tmp_path / "x.json").write_bytes(damaged)
        with pytest.raises(ArtifactError, match="damaged"):
            read_json(tmp_path / "x.json")


def test_sha256_of_known_content(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_fsync_tree_reaches_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    files = [tmp_path / "a", tmp_path / "deep" / "b", tmp_path / "deep" / "er" / "c"]
    for path in files:
        path.write_text("x")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    fsync_tree(tmp_path)
    assert synced[-1] == tmp_path.stat().st_ino
    assert set(synced) == {path.stat().st_ino for path in [tmp_path, *tmp_path.rglob("*")]}


def test_sizes_and_space(tmp_path: Path) -> None:
    assert [size_text(n) for n in (7, 1500, 2_000_000, 3.25e9, 5e12)] == ["7 B", "1.5 kB", "2.0 MB", "3.2 GB", "5.0 TB"]
    assert free_bytes(tmp_path / "not" / "there") > 0
