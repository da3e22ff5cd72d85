"""Every way a checkpoint can be damaged or incomplete ends in one error that names the file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dynaconv.artifacts.header import read_header
from dynaconv.artifacts.tensors import CheckpointReader, CheckpointWriter, read_tensors
from dynaconv.errors import CheckpointError


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    layout = [(f"layer.{i}.w", torch.float32, (8, 4)) for i in range(4)]
    with CheckpointWriter(folder, layout, shard_bytes=300) as writer:
        for name, dtype, shape in layout:
            writer.write(name, torch.randn(shape, dtype=dtype))
    assert len(list(folder.glob("*.safetensors"))) == 2
    return folder


def shard(folder: Path, number: int = 2) -> Path:
    return folder / f"model-0000{number}-of-00002.safetensors"


def rewrite_header(path: Path, change: Callable[[dict], object]) -> None:
    """Puts a changed header of the same length in front of the same data."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header = change(header) or header
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1, -100])
def test_truncated_shard(sharded: Path, keep: int) -> None:
    path = shard(sharded)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        CheckpointReader(sharded)
    assert path.name in str(caught.value)


def test_every_truncation_is_noticed(sharded: Path) -> None:
    path = shard(sharded)
    whole = path.read_bytes()
    for keep in range(len(whole)):
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError):
            read_header(path)


def test_trailing_bytes(sharded: Path) -> None:
    with shard(sharded).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match="longer"):
        CheckpointReader(sharded)


@pytest.mark.parametrize("length", [2, 10**6, 2**40, 2**64 - 1])
def test_header_length_garbage(sharded: Path, length: int) -> None:
    path = shard(sharded)
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(sharded)
    assert path.name in str(caught.value)


def test_header_bytes_garbage(sharded: Path) -> None:
    path = shard(sharded)
    data = bytearray(path.read_bytes())
    data[8:20] = b"\xff" * 12
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="header is corrupt"):
        CheckpointReader(sharded)


CHANGES: dict[str, Callable[[dict], object]] = {
    "a list": lambda header: [0],
    "no offsets": lambda header: header["layer.2.w"].pop("data_offsets") and None,
    "offsets of another size": lambda header: header["layer.2.w"].update(data_offsets=[0, 64]),
    "overlap": lambda header: header["layer.3.w"].update(data_offsets=[0, 128]),
    "gap": lambda header: header.pop("layer.2.w") and None,
    "negative shape": lambda header: header["layer.2.w"].update(shape=[-8, -4]),
    "shape of another size": lambda header: header["layer.2.w"].update(shape=[8, 5]),
    "shape of words": lambda header: header["layer.2.w"].update(shape=["a"]),
    "unknown dtype": lambda header: header["layer.2.w"].update(dtype="F33"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_header_that_lies(sharded: Path, change: Callable[[dict], object]) -> None:
    rewrite_header(shard(sharded), change)
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(sharded)
    assert shard(sharded).name in str(caught.value)


def test_missing_shard(sharded: Path) -> None:
    shard(sharded).unlink()
    with pytest.raises(CheckpointError, match=r"missing: model-00002-of-00002\.safetensors"):
        CheckpointReader(sharded)


def test_index_names_a_tensor_that_is_not_there(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["layer.9.w"] = shard(sharded).name
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"layer\.9\.w"):
        CheckpointReader(sharded)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../b"}}'])
def test_index_garbage(sharded: Path, content: str) -> None:
    from dynaconv.errors import ArtifactError

    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ArtifactError):
        CheckpointReader(sharded)


def test_shards_without_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="no index"):
        CheckpointReader(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_with_a_way_out(tmp_path: Path, name: str) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="pickle") as caught:
        CheckpointReader(tmp_path)
    assert name in str(caught.value)
    assert "save_pretrained" in str(caught.value)


def test_no_weights_no_folder_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        CheckpointReader(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="a file"):
        CheckpointReader(tmp_path / "file")
    with pytest.raises(CheckpointError, match="missing"):
        read_tensors(tmp_path / "nothing.safetensors")


def test_wrong_names_and_rows(sharded: Path) -> None:
    reader = CheckpointReader(sharded)
    with pytest.raises(CheckpointError, match=r"no tensor layer\.7\.w"):
        reader.read("layer.7.w")
    for start, stop in [(-1, 2), (3, 2), (0, 9)]:
        with pytest.raises(CheckpointError, match="no such rows"):
            reader.read_rows("layer.0.w", start, stop)


def test_file_that_shrinks_while_in_use(sharded: Path) -> None:
    reader = CheckpointReader(sharded)
    path = shard(sharded)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="changed while in use"):
        for name in reader.tensors:
            reader.read(name)
