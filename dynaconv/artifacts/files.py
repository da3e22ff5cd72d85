"""Files that appear whole or not at all, and errors of the disk said in one sentence.

Everything dynaconv writes goes to a temporary name in the same folder, is flushed to the disk, and is then renamed. So
a reader never meets half a file, whenever the writer was killed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dynaconv.errors import ArtifactError

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM)


def size_text(count: float) -> str:
    """``count`` bytes for a reader: ``"3.2 GB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def free_bytes(path: Path) -> int:
    """Bytes that can still be written below ``path``, which need not exist yet."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


@contextmanager
def storage_errors(path: Path, *, needed: int | None = None) -> Iterator[None]:
    """Turns what a disk can do to us into an :class:`ArtifactError`; other ``OSError`` pass through.

    Args:
        path: File or folder being written or read.
        needed: Bytes the whole operation needs, for the message when the disk is full.

    Raises:
        ArtifactError: The disk is full, read-only, failing, or access is denied.
    """
    try:
        yield
    except OSError as error:
        translated = _translate(error, path, needed)
        if translated is None:
            raise
        raise translated from error


def _translate(error: OSError, path: Path, needed: int | None) -> ArtifactError | None:
    where = error.filename or path
    if error.errno in FULL:  # of a copy, it is the second file that does not fit
        return disk_full(Path(error.filename2 or where), needed)
    if error.errno == errno.EROFS:
        return ArtifactError("the file system is read-only", where=where, hint="choose another folder with --out")
    if error.errno in FORBIDDEN:
        return ArtifactError("access is denied", where=where, hint="check the owner and permissions of the folder")
    if error.errno in (errno.EIO, errno.EFBIG):
        return ArtifactError(f"the disk failed: {error.strerror}", where=where)
    return None


def disk_full(path: Path, needed: int | None = None) -> ArtifactError:
    """The error for a full disk at ``path``, saying bytes ``needed`` and bytes free."""
    expected = None if needed is None else f"{needed} bytes free ({size_text(needed)})"
    free = free_bytes(path)
    return ArtifactError(
        "the disk is full",
        where=path,
        expected=expected,
        found=f"{free} bytes free ({size_text(free)})",
        hint="free some space or choose another disk with --out, then run the same command again",
    )


def require_space(path: Path, needed: int) -> None:
    """Refuses before anything is written when fewer than ``needed`` bytes are free below ``path``.

    Raises:
        ArtifactError: Too little space.
    """
    if free_bytes(path) < needed:
        raise disk_full(path, needed)


def sync_file(path: Path) -> None:
    """Flushes a file or the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flushes every file and folder below ``folder``, then ``folder`` itself.

    Raises:
        ArtifactError: The disk is full or failing (some file systems say so only now).
    """
    with storage_errors(folder):
        for path in sorted(folder.rglob("*"), reverse=True):
            if not path.is_symlink() and (path.is_file() or path.is_dir()):
                sync_file(path)
        sync_file(folder)


def partial_name(path: Path) -> Path:
    """Where ``path`` is written before it is renamed; tells processes apart."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def replacing(path: Path, *, needed: int | None = None) -> Iterator[Path]:
    """Yields a temporary name beside ``path``; flushes and renames it to ``path`` when the block succeeds.

    Raises:
        ArtifactError: The disk is full, read-only, failing, or access is denied.
    """
    partial = partial_name(path)
    with storage_errors(path, needed=needed):
        if os.path.lexists(partial):  # perhaps a link: what it leads to is not ours to write
            partial.unlink()
        try:
            yield partial
            sync_file(partial)
            partial.replace(path)
            sync_file(path.parent)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def atomic_write(path: Path, content: str | bytes) -> None:
    """Writes ``content`` (text as UTF-8) to ``path``: the old content or the new, never a mixture.

    Raises:
        ArtifactError: The disk is full, read-only, failing, or access is denied.
    """
    data = content.encode() if isinstance(content, str) else content
    with replacing(path, needed=len(data)) as partial:
        partial.write_bytes(data)


def write_json(path: Path, content: Any) -> None:
    """Writes ``content`` as sorted, indented JSON, atomically.

    Raises:
        ArtifactError: As :func:`atomic_write`.
    """
    atomic_write(path, json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        ArtifactError: The file is missing, unreadable or not JSON.
    """
    try:
        with storage_errors(path):
            return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path.name} is missing", where=path.parent) from error
    except (ValueError, RecursionError) as error:  # the latter from lists within lists without end
        raise ArtifactError(f"{path.name} is damaged: not valid JSON", where=path, found=error) from error


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content.

    Raises:
        ArtifactError: The file cannot be read.
    """
    with storage_errors(path), path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
