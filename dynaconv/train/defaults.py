"""The embedded default source: a tiny Llama pretrained on the standard library, made once and kept in a cache."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynaconv.artifacts.files import storage_errors
from dynaconv.artifacts.fingerprint import fingerprint
from dynaconv.data.digest import digest
from dynaconv.errors import ArtifactError
from dynaconv.progress import Progress
from dynaconv.train.pretrain import Pretraining, pretrain

RECIPE = 1  # raise when a change in how the base is trained changes the result of the same settings


def default_source(progress: Progress, settings: Pretraining | None = None) -> Path:
    """Folder of the embedded default, trained now if the cache has none of these settings and this Python's text.

    Two processes that want it at once train it once: the second waits. A killed attempt leaves nothing that counts.

    Args:
        progress: Shows the training.
        settings: Instead of the embedded ones.

    Raises:
        ArtifactError: The cache cannot be written.
        DataError: This Python comes without its standard library's source.
    """
    settings = settings or Pretraining()
    folder = default_folder(settings)
    if (folder / "config.json").is_file():
        return folder
    with _alone(folder, progress):
        if not (folder / "config.json").is_file():
            for leftover in folder.parent.glob(f".{folder.name}.*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
            progress.say("no SOURCE given: making the embedded base model, once; about two minutes on free cores")
            pretrain(folder, settings, progress)
    return folder


def default_folder(settings: Pretraining | None = None) -> Path:
    """Where the base of these settings and this Python's text is, or will be once it is made."""
    settings = settings or Pretraining()
    python = ".".join(platform.python_version_tuple()[:2])
    parts = {
        "recipe": RECIPE,
        "settings": dataclasses.asdict(settings),
        "python": python,
        "text": digest(settings.data),
    }
    return cache_folder() / f"base-{fingerprint(parts)[:16]}"


def cache_folder() -> Path:
    """``$DYNACONV_CACHE``, else ``dynaconv`` in the user's cache folder."""
    named = os.environ.get("DYNACONV_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dynaconv"


@contextmanager
def _alone(folder: Path, progress: Progress) -> Iterator[None]:
    """Holds a lock that the system drops when the process ends, however it ends."""
    lock = folder.with_name(f".{folder.name}.lock")
    try:
        with storage_errors(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("w")
    except (ArtifactError, OSError) as error:
        found, hint = str(error).splitlines()[0], "set DYNACONV_CACHE to a folder that can be written, or name a SOURCE"
        raise ArtifactError("the cache cannot be written", where=lock.parent, found=found, hint=hint) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say("another process is making the embedded base model: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
