"""Writing safetensors whose tensors arrive one by one, in any order, without holding more than one.

Shards are planned from the names, dtypes and shapes first. Their headers are written, their space is reserved, and each
tensor goes straight to its place. Files carry a temporary name until :meth:`CheckpointWriter.close`, so a checkpoint
that was interrupted is never mistaken for one that is whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dynaconv.artifacts.files import partial_name, replacing, require_space, storage_errors, sync_file, write_json
from dynaconv.artifacts.header import Entry, plan_file
from dynaconv.errors import ArtifactError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
METADATA = {"format": "pt"}
PIECE_BYTES = 64 * 1024**2

TensorLayout = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class _Slot:
    """Where one tensor goes."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def rows(self) -> int:
        """What counts towards "written once": rows, or 1 where there are none."""
        return max(self.shape[0], 1) if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes between the starts of two rows."""
        return prod(self.shape[1:]) * self.dtype.itemsize


class CheckpointWriter:
    """Writes ``model.safetensors``, or shards with an index, into ``folder``. A context manager.

    Args:
        folder: Where to; made if missing.
        layout: Name, dtype and shape of every tensor; shards are filled in this order.
        shard_bytes: Largest shard, unless one tensor alone is larger.
        prefix: First part of the file names.

    Raises:
        ArtifactError: The layout names a tensor twice or has a dtype safetensors cannot hold, a file of that name
            exists, or the disk is too full (nothing is written then), read-only or not accessible.
    """

    def __init__(
        self, folder: Path, layout: Sequence[TensorLayout], *, shard_bytes: int = 4 * 1024**3, prefix: str = "model"
    ) -> None:
        self.folder, self.prefix = Path(folder), prefix
        groups = _shards(layout, shard_bytes)
        names = [_shard_name(prefix, i, len(groups)) for i in range(len(groups))]
        plans = {self.folder / name: plan_file(group, METADATA) for name, group in zip(names, groups, strict=True)}
        self._files = {path: partial_name(path) for path in plans}
        self._slots = {entry.name: _slot(entry, path) for path, (_, entries) in plans.items() for entry in entries}
        if len(self._slots) != len(layout):
            raise ArtifactError("the layout names a tensor twice", where=self.folder)
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in self._slots}
        self._needed = sum(max(len(head), *(e.stop for e in entries), 0) for head, entries in plans.values())
        self._closed = False
        existing = [path for path in plans if path.exists()]
        if existing:
            raise ArtifactError("a checkpoint is already here", where=existing[0], hint="write to an empty folder")
        with storage_errors(self.folder, needed=self._needed):
            self.folder.mkdir(parents=True, exist_ok=True)
            require_space(self.folder, self._needed)
            try:
                for path, (head, entries) in plans.items():
                    _reserve(self._files[path], head, entries)
            except BaseException:
                self._discard()
                raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a whole tensor, from any device and memory layout.

        Raises:
            ArtifactError: The layout has no such tensor, dtype or shape differ from it, it was written before, or the
                disk is full.
        """
        slot = self._slot(name)
        self._check(name, tensor, slot.shape)
        self._put(name, 0, slot.rows, tensor)

    def write_rows(self, name: str, start: int, tensor: Tensor) -> None:
        """Writes ``tensor`` to rows ``start`` and following of the first dimension.

        Raises:
            ArtifactError: As :meth:`write`.
        """
        slot = self._slot(name)
        count = tensor.shape[0] if tensor.dim() else 0
        if not slot.shape or start < 0 or start + count > slot.shape[0]:
            found = f"rows {start} to {start + count}"
            raise ArtifactError(f"{name} has no such rows", where=slot.file, expected=list(slot.shape), found=found)
        self._check(name, tensor, (count, *slot.shape[1:]))
        if count:
            self._put(name, start, start + count, tensor)

    def close(self) -> None:
        """Flushes the shards, gives them their names, and writes the index.

        Raises:
            ArtifactError: A tensor was not written, or not all of it; or the disk is full. Nothing is left then.
        """
        if self._closed:
            return
        missing = [name for name, slot in self._slots.items() if self._rows_written(name) != slot.rows]
        if missing:
            self._discard()
            found = f"{len(missing)} missing or incomplete: {', '.join(missing[:5])}"
            raise ArtifactError("the checkpoint is not complete", where=self.folder, found=found)
        with storage_errors(self.folder, needed=self._needed):
            for path, partial in self._files.items():
                sync_file(partial)
                partial.replace(path)
            if len(self._files) > 1:
                self._write_index()
            sync_file(self.folder)
        self._closed = True

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif not self._closed:
            self._discard()

    def _slot(self, name: str) -> _Slot:
        if self._closed:
            raise ArtifactError("the checkpoint is already closed", where=self.folder)
        if name not in self._slots:
            raise ArtifactError(f"the layout has no tensor {name}", where=self.folder)
        return self._slots[name]

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        slot = self._slots[name]
        if tensor.dtype != slot.dtype or tuple(tensor.shape) != shape:
            expected = f"{slot.dtype} {list(shape)}"
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise ArtifactError(f"{name} does not fit its layout", where=slot.file, expected=expected, found=found)

    def _put(self, name: str, start: int, stop: int, tensor: Tensor) -> None:
        slot = self._slots[name]
        if any(start < other_stop and other_start < stop for other_start, other_stop in self._written[name]):
            raise ArtifactError(f"{name} is written twice", where=slot.file, found=f"rows {start} to {stop}")
        with storage_errors(slot.file, needed=self._needed):
            write_at(self._files[slot.file], slot.start + start * slot.row_bytes, tensor)
        self._written[name].append((start, stop))

    def _rows_written(self, name: str) -> int:
        return sum(stop - start for start, stop in self._written[name])

    def _write_index(self) -> None:
        total = sum(prod(slot.shape) * slot.dtype.itemsize for slot in self._slots.values())
        weight_map = {name: slot.file.name for name, slot in self._slots.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(self.folder / f"{self.prefix}.safetensors.index.json", index)

    def _discard(self) -> None:
        self._closed = True
        for partial in self._files.values():
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes one safetensors file, atomically; replaces what was there.

    Raises:
        ArtifactError: A dtype that safetensors cannot hold; the disk is full, read-only or not accessible.
    """
    layout = [(name, _dtype_name(name, tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    head, entries = plan_file(layout, {**METADATA, **(metadata or {})})
    needed = max(len(head), *(entry.stop for entry in entries), 0)
    with replacing(path, needed=needed) as partial:
        require_space(path.parent, needed)
        _reserve(partial, head, entries)
        for entry in entries:
            write_at(partial, entry.start, tensors[entry.name])


def bytes_of(tensor: Tensor) -> Any:
    """The memory of a contiguous CPU tensor as a one-dimensional array of bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def write_at(path: Path, position: int, tensor: Tensor) -> None:
    """Writes a tensor's elements in row-major order from byte ``position`` of an existing file."""
    with path.open("r+b", buffering=0) as file:
        file.seek(position)
        for piece in _pieces(tensor.detach()):
            source = memoryview(bytes_of(piece.cpu().contiguous()))
            while source:  # one write moves at most 2 GiB
                source = source[file.write(source) :]


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """``tensor`` itself where its memory can be written as it is; else slices, so that no whole copy is made."""
    if tensor.dim() == 0 or (tensor.is_contiguous() and tensor.device.type == "cpu"):
        yield tensor
        return
    rows = max(1, PIECE_BYTES // max(1, tensor[:1].numel() * tensor.element_size()))
    for start in range(0, tensor.shape[0], rows):
        yield tensor[start : start + rows]


def _reserve(path: Path, head: bytes, entries: Sequence[Entry]) -> None:
    """Creates the file with its header and all of its space, so that a full disk shows now and not hours later."""
    size = max(len(head), *(entry.stop for entry in entries), 0)
    with path.open("xb") as file:
        file.write(head)
        file.flush()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


def _slot(entry: Entry, file: Path) -> _Slot:
    dtype = next(dtype for dtype, name in DTYPES.items() if name == entry.dtype)
    return _Slot(file, dtype, entry.shape, entry.start)


def _dtype_name(name: str, dtype: torch.dtype) -> str:
    if dtype not in DTYPES:
        raise ArtifactError(f"{name} has a dtype safetensors cannot hold", found=dtype)
    return DTYPES[dtype]


def _shards(layout: Sequence[TensorLayout], shard_bytes: int) -> list[list[tuple[str, str, tuple[int, ...]]]]:
    """Groups tensors, in order, so that none but a single large tensor exceeds ``shard_bytes``."""
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, dtype, shape in layout:
        size = prod(shape) * dtype.itemsize
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((name, _dtype_name(name, dtype), tuple(shape)))
        filled += size
    return groups


def _shard_name(prefix: str, i: int, count: int) -> str:
    return f"{prefix}.safetensors" if count == 1 else f"{prefix}-{i + 1:05}-of-{count:05}.safetensors"
