"""Checkpoints larger than memory: read a tensor or a slice at a time, write them in any order.

Reads are plain reads into memory of their own, never maps: mapped pages count as resident, so a shard read end to end
through a map would peak at the shard's size. :mod:`dynaconv.artifacts.writer` is the other direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from dynaconv.artifacts.files import read_json, storage_errors
from dynaconv.artifacts.header import Entry, read_header
from dynaconv.artifacts.writer import DTYPES, CheckpointWriter, bytes_of, write_tensors
from dynaconv.errors import CheckpointError

__all__ = ["CheckpointReader", "CheckpointWriter", "TensorInfo", "read_tensors", "write_tensors"]

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor is: bytes ``start`` to ``stop`` of ``file``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk and in memory."""
        return self.stop - self.start

    @classmethod
    def of(cls, entry: Entry, file: Path) -> TensorInfo:
        """From an entry of ``file``'s header."""
        return cls(entry.name, TORCH_DTYPES[entry.dtype], entry.shape, file, entry.start, entry.stop)


class CheckpointReader:
    """The tensors of a checkpoint folder: ``model.safetensors``, or shards with an index.

    Args:
        folder: The checkpoint.

    Attributes:
        folder: The checkpoint.
        tensors: What is there, by name, in file order. Each shard's header has been read and checked.

    Raises:
        CheckpointError: The folder is missing, has only pickle files or no weights at all; a shard is missing,
            truncated or corrupt; or a tensor that the index names is in no shard.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            found = "a file" if self.folder.is_file() else "nothing"
            raise CheckpointError("no checkpoint folder here", where=self.folder, expected="a folder", found=found)
        if (self.folder / SINGLE).is_file():
            self.tensors = _infos(self.folder / SINGLE)
        elif (self.folder / INDEX).is_file():
            self.tensors = _read_shards(self.folder)
        else:
            raise _no_weights(self.folder)

    @classmethod
    def of_file(cls, path: Path) -> CheckpointReader:
        """The tensors of one safetensors file that is no whole checkpoint, such as statistics.

        Raises:
            CheckpointError: The file is missing, truncated or corrupt.
        """
        if not path.is_file():
            raise CheckpointError(f"{path.name} is missing", where=path.parent)
        reader = cls.__new__(cls)
        reader.folder, reader.tensors = path.parent, _infos(path)
        return reader

    @classmethod
    def imagined(cls, folder: Path, tensors: dict[str, TensorInfo]) -> CheckpointReader:
        """Tensors that are in no file yet; they cannot be read."""
        reader = cls.__new__(cls)
        reader.folder, reader.tensors = folder, tensors
        return reader

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def info(self, name: str) -> TensorInfo:
        """Where ``name`` is.

        Raises:
            CheckpointError: No such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(f"the checkpoint has no tensor {name}", where=self.folder)
        return self.tensors[name]

    def read(self, name: str) -> Tensor:
        """The whole tensor.

        Raises:
            CheckpointError: No such tensor, or the file shrank since it was opened.
        """
        info = self.info(name)
        return _read(info, 0, info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the first dimension; reads no other bytes.

        Raises:
            CheckpointError: No such tensor, no such rows, or the file shrank since it was opened.
        """
        info = self.info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            found = f"rows {start} to {stop}"
            raise CheckpointError(f"{name} has no such rows", where=info.file, expected=list(info.shape), found=found)
        row_bytes = info.nbytes // max(info.shape[0], 1)
        return _read(info, start * row_bytes, (stop - start, *info.shape[1:]))

    def read_finite(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The whole tensor, or ``rows`` (start, stop) of it; refused when it holds NaN or infinity.

        Raises:
            CheckpointError: As :meth:`read` and :meth:`read_rows`, and for values that are not finite.
        """
        tensor = self.read(name) if rows is None else self.read_rows(name, *rows)
        if not _finite(tensor):
            count = int((~torch.isfinite(tensor.float())).sum())
            raise CheckpointError(
                f"{name} has values that are not finite",
                where=self.info(name).file,
                expected="finite numbers",
                found=f"{count} of {tensor.numel()} are NaN or infinite",
                hint="download the checkpoint again; its weights are damaged",
            )
        return tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, such as routers or statistics.

    Raises:
        CheckpointError: The file is missing, truncated or corrupt.
    """
    reader = CheckpointReader.of_file(path)
    return {name: reader.read(name) for name in reader.tensors}


def _infos(path: Path) -> dict[str, TensorInfo]:
    return {entry.name: TensorInfo.of(entry, path) for entry in read_header(path)}


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    """Tensors of all shards that the index names; where two shards hold one name, the index decides."""
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("the index has no weight_map", where=folder / INDEX, hint="download the file again")
    shards = sorted({str(shard) for shard in weight_map.values()})
    missing = [shard for shard in shards if Path(shard).name != shard or not (folder / shard).is_file()]
    if missing:
        expected = f"{len(shards)} shards"
        found = f"missing: {', '.join(missing)}"
        raise CheckpointError("shards named by the index are missing", where=folder, expected=expected, found=found)
    by_shard = {shard: _infos(folder / shard) for shard in shards}
    absent = [name for name, shard in weight_map.items() if name not in by_shard[shard]]
    if absent:
        listed = ", ".join(f"{name} ({weight_map[name]})" for name in absent[:5])
        found = f"{len(absent)} absent from their shard: {listed}"
        raise CheckpointError("the index and the shards disagree", where=folder / INDEX, found=found)
    every = {name: info for infos in by_shard.values() for name, info in infos.items()}
    return {name: by_shard[weight_map[name]][name] if name in weight_map else info for name, info in every.items()}


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    shards = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))
    expected = f"{SINGLE}, or shards with {INDEX}"
    if shards:
        return CheckpointError("the shards have no index", where=folder, expected=expected, found=", ".join(shards[:3]))
    if not pickles:
        return CheckpointError("the folder holds no weights", where=folder, expected=expected, found="none")
    convert = f"M.from_pretrained({str(folder)!r}).save_pretrained({str(folder) + '-safetensors'!r})"
    return CheckpointError(
        "the weights are pickle files, which can run code when loaded",
        where=folder,
        expected=expected,
        found=", ".join(pickles[:3]),
        hint="if you trust them, convert once and use the new folder: "
        f'python -c "from transformers import AutoModelForCausalLM as M; {convert}"',
    )


def _read(info: TensorInfo, offset: int, shape: tuple[int, ...]) -> Tensor:
    """A tensor of ``shape`` from byte ``offset`` of ``info``'s range."""
    tensor = torch.empty(shape, dtype=info.dtype)
    target = memoryview(bytes_of(tensor))
    with storage_errors(info.file), info.file.open("rb", buffering=0) as file:
        file.seek(info.start + offset)
        while target:  # one read moves at most 2 GiB
            count = file.readinto(target)
            if not count:
                raise CheckpointError(f"the file ended within {info.name}: it changed while in use", where=info.file)
            target = target[count:]
    return tensor


def _finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite. One pass, no temporary: NaN and infinity both show in the extremes."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()  # no minimum is defined for 8-bit floats
    low, high = torch.aminmax(wide)
    return bool(torch.isfinite(low) and torch.isfinite(high))
