"""Reads local text in parts: byte ranges of files that start and end between documents.

A part is the unit of laziness. A file of any size is cut into parts without being read, parts are put in a fair order
by the caller, and only as many are read as tokens are needed. Text files hold one document, or several separated by
``<|endoftext|>``; ``.jsonl`` holds one a line; ``.parquet`` one a row. Records hold a text, or a conversation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dynaconv.data.conversation import canonical
from dynaconv.errors import DataError

MARKER = "<|endoftext|>"  # separates documents in text dumps; never tokenised as text
RANGE = 256 * 1024  # bytes in a part, and the longest document that stays whole
ROWS = 1024  # of parquet decoded at once: a row group may be larger than memory likes
LOOK_AHEAD = 64 * 1024  # bytes searched for a good place to cut; less than RANGE, so that cuts never cross


class Document(NamedTuple):
    """One text and a name that says where it is from; of a conversation, the text is its canonical JSON."""

    name: str
    text: str
    chat: bool = False


@dataclass(frozen=True)
class Part:
    """Bytes (of parquet: row groups) ``[start, stop)`` of one file.

    Attributes:
        name: The file's name relative to what the user named; the same wherever the folder lies.
        path: The file.
        start: First byte or row group.
        stop: One past the last.
    """

    name: str
    path: Path
    start: int
    stop: int

    @property
    def key(self) -> bytes:
        """Sorts parts into an order that has nothing to do with the alphabet: any prefix is a fair sample."""
        return hashlib.sha256(f"{self.name}\0{self.start}".encode()).digest()


def parts_of(name: str, path: Path) -> Iterator[Part]:
    """Cuts one file into parts, reading no more than a little around each cut.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            groups = _parquet(path).num_row_groups
            yield from (Part(name, path, group, group + 1) for group in range(groups))
            return
        size, start = path.stat().st_size, 0
        with path.open("rb") as file:
            for position in range(RANGE, size + RANGE, RANGE):
                stop = size if position >= size else _cut(file, position, size, lines=path.suffix == ".jsonl")
                if stop > start:
                    yield Part(name, path, start, stop)
                start = stop
    except OSError as error:
        raise DataError("cannot read a text file", where=path, found=error.strerror) from error


def read_part(part: Part, field: str, chat: str | None = None) -> Iterator[Document]:
    """The documents of ``part`` in file order, empty ones left out.

    Args:
        part: What to read.
        field: Field of records that holds the text.
        chat: Field of records that holds a conversation, read instead of ``field``; ``None`` for none.

    Raises:
        DataError: A record is not JSON, lacks the field or holds something else in it; the file cannot be read.
        UnicodeDecodeError: The text is not UTF-8, or holds NUL bytes.
    """
    records = part.path.suffix in (".parquet", ".jsonl")
    if part.path.suffix == ".parquet":
        texts = _read_rows(part, field, chat)
    elif part.path.suffix == ".jsonl":
        texts = _read_lines(part, field, chat)
    else:
        texts = iter(_decode(_bytes(part)).split(MARKER))
    for index, text in enumerate(texts):
        if text.strip():
            yield Document(f"{part.name}@{part.start}#{index}", text, records and chat is not None)


def text_of(record: Any, field: str, chat: str | None, where: str) -> str:
    """The text of one jsonl record or dataset row, or its conversation as JSON; ``""`` where it is null.

    Raises:
        DataError: No such field (lists those that are there), or it holds something else.
    """
    if chat is not None:
        messages = _member(record, chat, "data.chat", where)
        return canonical(messages, f"{where}, field {chat!r}") if messages else ""
    text = _member(record, field, "data.field", where)
    if text is not None and not isinstance(text, str):
        raise DataError(f"field {field!r} holds no text", where=where, found=type(text).__name__, hint="set data.field")
    return text or ""


def _member(record: Any, field: str, setting: str, where: str) -> Any:
    if not isinstance(record, dict):
        raise DataError("a record is no JSON object", where=where, found=type(record).__name__)
    if field not in record:
        names = ", ".join(sorted(map(str, record))) or "none"
        hint = f"name one of them: {setting}=NAME"
        raise DataError(f"no field {field!r} in the records", where=where, found=f"fields {names}", hint=hint)
    return record[field]


def _cut(file: BinaryIO, position: int, size: int, *, lines: bool) -> int:
    """First place at or after ``position`` (bytes) between two documents; between two lines where none is near."""
    if not lines:
        file.seek(position)
        ahead = file.read(LOOK_AHEAD)
        found = ahead.find(MARKER.encode())
        if found < 0:
            found = ahead.find(b"\n") + 1  # 0 where there is no line end either
        while 0 <= found < len(ahead) and ahead[found] & 0xC0 == 0x80:  # never inside a UTF-8 character
            found += 1
        return position + found
    position -= 1  # a line that starts exactly at the cut belongs behind it
    while position < size:
        file.seek(position)
        ahead = file.read(LOOK_AHEAD)
        found = ahead.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(ahead)
    return size


def _bytes(part: Part) -> bytes:
    try:
        with part.path.open("rb") as file:
            file.seek(part.start)
            return file.read(part.stop - part.start)
    except OSError as error:
        raise DataError("cannot read a text file", where=part.path, found=error.strerror) from error


def _decode(raw: bytes) -> str:
    if 0 in raw:
        raise UnicodeDecodeError("utf-8", raw[:0], 0, 0, "NUL bytes: a binary file")
    return raw.decode("utf-8-sig").replace("\r\n", "\n")


def _read_lines(part: Part, field: str, chat: str | None) -> Iterator[str]:
    offset = part.start
    for line in _bytes(part).split(b"\n"):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                where = f"{part.path}, line {_line_number(part.path, offset)}"
                raise DataError("a line is not JSON", where=where, found=error) from error
            yield text_of(record, field, chat, str(part.path))
        offset += len(line) + 1


def _line_number(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        return file.read(offset).count(b"\n") + 1


def _parquet(path: Path) -> Any:
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

    try:
        return parquet.ParquetFile(path)
    except ArrowException as error:
        raise DataError("not a readable parquet file", where=path, found=error) from error


def _read_rows(part: Part, field: str, chat: str | None) -> Iterator[str]:
    file, column = _parquet(part.path), chat or field
    names = file.schema_arrow.names
    if column not in names:
        text_of(dict.fromkeys(names), field, chat, str(part.path))
    for rows in file.iter_batches(ROWS, row_groups=[part.start], columns=[column]):
        for row in rows.to_pylist():
            yield text_of(row, field, chat, str(part.path))
