"""The safetensors file format: its header, read and planned without torch.

A file is eight bytes with the header's length (little endian), the header (JSON: name -> dtype, shape, offsets), and
the tensors' bytes back to back. See https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dynaconv.artifacts.files import storage_errors
from dynaconv.errors import CheckpointError

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: ``start`` and ``stop`` are bytes from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of ``shape``."""
    return ITEM_BYTES[dtype] * prod(shape)


def read_header(path: Path) -> list[Entry]:
    """Tensors of the safetensors file at ``path``, in file order.

    Raises:
        CheckpointError: The header is corrupt, or the file is shorter or longer than its header says.
    """
    with storage_errors(path), path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
            found = f"{size} bytes, and a header that claims {length}"
            raise _damaged("the shard is truncated or not a safetensors file", path, "a whole header", found)
        content = file.read(length)
    entries = _entries(path, content, LENGTH_BYTES + length)
    expected = entries[-1].stop if entries else LENGTH_BYTES + length
    if size != expected:
        what = "the shard is truncated" if size < expected else "the shard is longer than its header says"
        raise _damaged(what, path, f"{expected} bytes", f"{size} bytes")
    return entries


def _entries(path: Path, content: bytes, base: int) -> list[Entry]:
    """The header's tensors, checked to lie back to back from byte ``base`` on."""
    try:
        table = json.loads(content)
        table.pop("__metadata__", None)
        entries = [_entry(name, fields, base) for name, fields in table.items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise _damaged("the shard's header is corrupt", path, "a JSON table of tensors", reason) from error
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    position = base
    for entry in entries:
        if entry.dtype not in ITEM_BYTES:
            known = ", ".join(ITEM_BYTES)
            raise CheckpointError(f"{entry.name} has an unknown dtype", where=path, expected=known, found=entry.dtype)
        if entry.start != position or entry.stop - entry.start != tensor_bytes(entry.dtype, entry.shape):
            expected = f"{entry.name} {entry.dtype} {list(entry.shape)} from byte {position}"
            raise _damaged("the shard's header is corrupt", path, expected, f"bytes {entry.start} to {entry.stop}")
        position = entry.stop
    return entries


def _entry(name: str, fields: Any, base: int) -> Entry:
    start, stop = (int(offset) for offset in fields["data_offsets"])
    shape = tuple(int(size) for size in fields["shape"])
    if start < 0 or min(shape, default=0) < 0:
        raise ValueError(f"negative size or offset in {name}")
    return Entry(name, str(fields["dtype"]), shape, base + start, base + stop)


def _damaged(what: str, path: Path, expected: str, found: str) -> CheckpointError:
    return CheckpointError(what, where=path, expected=expected, found=found, hint="download or copy the file again")


def plan_file(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[Entry]]:
    """Leading bytes of a new file, and where each of ``tensors`` (name, dtype, shape) goes.

    Wider dtypes come first, so that every tensor is aligned to its item size whatever the mixture.
    """
    ordered = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor[1]])
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in ordered:
        stop = position + tensor_bytes(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    content = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % LENGTH_BYTES)
    base = LENGTH_BYTES + len(content)
    entries = [
        Entry(name, dtype, shape, *(base + at for at in table[name]["data_offsets"])) for name, dtype, shape in ordered
    ]
    return len(content).to_bytes(LENGTH_BYTES, "little") + content, entries
