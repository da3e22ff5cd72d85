"""One process at a time: an advisory lock on a file, let go by the kernel however its holder ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynaconv.artifacts.files import storage_errors
from dynaconv.errors import ArtifactError, LockedRunError

SECONDS_OF_PATIENCE = 0.5  # someone may be asking who holds it, which takes it for an instant


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds the lock on ``path`` for the block; the file then names the holder.

    Raises:
        LockedRunError: Another process holds it, named by its pid.
        ArtifactError: The folder is read-only or not accessible, or ``path`` is something else than a file.
    """
    descriptor = _open(path, os.O_RDWR | os.O_CREAT)
    try:
        if not _acquired(descriptor):
            raise LockedRunError(
                "another process is working on this run",
                where=path.parent,
                found=_read(descriptor),
                hint="wait for it to finish, or stop it; what it has done so far is kept",
            )
        with storage_errors(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def holder(path: Path) -> str | None:
    """Who holds the lock on ``path``, such as ``"pid 123 on host"``; ``None`` when nobody does.

    Raises:
        ArtifactError: ``path`` is not accessible or something else than a file.
    """
    if not os.path.lexists(path):
        return None
    descriptor = _open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(descriptor)
    else:
        return None
    finally:
        os.close(descriptor)


def _open(path: Path, flags: int) -> int:
    """A descriptor of the plain file ``path``: a link would have another file written to, and a pipe has no end."""
    try:
        with storage_errors(path):
            descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise _no_file(path) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_file(path)
    return descriptor


def _no_file(path: Path) -> ArtifactError:
    hint = "remove it, unless another process is at work here"
    return ArtifactError("the lock is not a plain file", where=path, expected="a file or nothing", hint=hint)


def _acquired(descriptor: int) -> bool:
    patience = time.monotonic() + SECONDS_OF_PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > patience:
                return False
            time.sleep(0.05)
        else:
            return True


def _read(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode(errors="replace") or "a process that has just begun"
