"""Where text comes from: files, globs, folders, jsonl, parquet, dataset names, and ``python-stdlib``.

A data spec is one string:

- ``python-stdlib``: the ``.py`` files of the running Python's own standard library, which is real text on every
  machine. Left out are its tests, idlelib, whatever is installed into it, and tables written by generators
  (``encodings``, ``pydoc_data``, ``_sysconfigdata*``), which are not prose of any kind.
- a file: ``.jsonl`` and ``.parquet`` hold records, anything else is text.
- a glob, absolute or relative, with ``**`` for folders within folders: every file that matches.
- a folder: all files under it that end in one of :data:`SUFFIXES`. Hidden files and folders are left out and
  links are followed, once.
- otherwise the name of a Hugging Face dataset, ``NAME`` or ``NAME:SPLIT``; see ``hub.py``.
"""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dynaconv.config import DataConfig
from dynaconv.data import hub
from dynaconv.data.readers import Document, Part, parts_of, read_part
from dynaconv.errors import DataError

STDLIB = "python-stdlib"
_PROSE = {".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org"}
_CODE = {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go", ".java", ".js", ".ts", ".sh", ".rb", ".jl"}
SUFFIXES = frozenset(_PROSE | _CODE | {".jsonl", ".parquet"})
_STDLIB_WITHOUT = frozenset(
    {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)


def documents(
    specs: str | Sequence[str], config: DataConfig, *, split: str | None = None, skipped: list[str] | None = None
) -> Iterator[Document]:
    """All documents of ``specs``, lazily, in an order fixed by hashes of their names.

    Local files are one pool, read in parts whose order is a hash's, so that any prefix is a fair sample of all of
    them. Datasets take turns with the pool, a document each.

    Args:
        specs: One data spec or several.
        config: Says which field holds the text and what to exclude.
        split: Split of the datasets among ``specs``; ``config.dataset_split`` when ``None``.
        skipped: Collects the names of files that are left out because they are not UTF-8 text.

    Raises:
        DataError: A spec matches nothing, or cannot be read.
    """
    specs = [specs] if isinstance(specs, str) else list(specs)
    local, names = [], []
    for spec in specs:
        found = files(spec, config.exclude)
        if found is None:
            names.append(spec)
        else:
            local += found
    streams = [hub.documents(name, config, split or config.dataset_split) for name in names]
    if local:
        streams.insert(0, _local_documents(local, config, [] if skipped is None else skipped))
    yield from _take_turns(streams)


def files(spec: str, exclude: Iterable[str] = ()) -> list[tuple[str, Path]] | None:
    """Local files of ``spec`` as (name relative to the spec, path), sorted by name; ``None`` for a dataset's name.

    Raises:
        DataError: Nothing matches.
    """
    root = Path(spec).expanduser()
    if spec == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = [(name, path) for name, path in _walk(root, {".py"}, _STDLIB_WITHOUT) if "_sysconfigdata" not in name]
    elif root.is_file():
        found = [(root.name, root)]
    elif root.is_dir():
        found = list(_walk(root, SUFFIXES, frozenset()))
    elif glob.has_magic(spec):
        found = _match(str(root))
    elif _looks_local(spec):
        raise DataError("no such file or folder", where=f"data={spec}", hint=f"paths start at {Path.cwd()}")
    else:
        return None
    kept = sorted((name, path) for name, path in found if not _excluded(name, path, exclude))
    if not kept:
        raise DataError("no text found", where=f"data={spec}", expected=_expected(root, spec), found=_found(found))
    return kept


def _local_documents(found: list[tuple[str, Path]], config: DataConfig, skipped: list[str]) -> Iterator[Document]:
    parts: list[Part] = [part for name, path in found for part in parts_of(name, path)]
    for part in sorted(parts, key=lambda part: part.key):
        try:
            yield from read_part(part, config.field, config.chat)
        except UnicodeDecodeError as error:
            if len(found) == 1:
                raise DataError("not UTF-8 text", where=part.path, found=error.reason) from error
            if part.name not in skipped:
                skipped.append(part.name)


def _take_turns(streams: list[Iterator[Document]]) -> Iterator[Document]:
    while streams:
        for stream in list(streams):
            document = next(stream, None)
            if document is None:
                streams.remove(stream)
            else:
                yield document


def _walk(root: Path, suffixes: Iterable[str], without: frozenset[str]) -> Iterator[tuple[str, Path]]:
    seen: set[tuple[int, int]] = set()  # of folders: links may lead back up
    for folder, children, names in os.walk(root, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            children.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        children[:] = sorted(child for child in children if not child.startswith(".") and child not in without)
        for name in names:
            path = Path(folder, name)
            if path.suffix in suffixes and not name.startswith(".") and path.is_file():
                yield path.relative_to(root).as_posix(), path


def _match(pattern: str) -> list[tuple[str, Path]]:
    parts = Path(pattern).parts
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts))  # names are relative to this
    matches = glob.glob(pattern, recursive=True)  # noqa: PTH207 - takes absolute patterns and leaves hidden files out
    paths = (Path(match) for match in matches)
    return [(path.relative_to(fixed).as_posix(), path) for path in paths if path.is_file()]


def _excluded(name: str, path: Path, patterns: Iterable[str]) -> bool:
    spellings = (name, path.name, str(path))
    return any(fnmatch.fnmatch(spelling, pattern) for pattern in patterns for spelling in spellings)


def _looks_local(spec: str) -> bool:
    """Dataset names are ``name`` or ``owner/name``; everything else must have been meant as a path."""
    return spec.startswith((".", "/", "~")) or spec.count("/") > 1 or Path(spec).suffix in SUFFIXES | {".json", ".gz"}


def _expected(root: Path, spec: str) -> str:
    if root.is_dir() and spec != STDLIB:
        return "files that end in " + " ".join(sorted(SUFFIXES)) + " (a glob takes any)"
    return "at least one file"


def _found(found: list[tuple[str, Path]]) -> str:
    return f"{len(found)} files, all of them excluded by data.exclude" if found else "none"
