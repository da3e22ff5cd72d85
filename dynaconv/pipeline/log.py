"""``logs/<stage>.log``: all a stage says, as plain text; its warnings are shown on the screen too."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dynaconv.artifacts.files import storage_errors
from dynaconv.errors import ArtifactError
from dynaconv.progress import Progress


class _File(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A line that cannot be written (the disk is full) must not hide the error that the stage raises."""


class _Screen(logging.Handler):
    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self.progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        """Shows the line."""
        self.progress.show(f"{record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def stage_log(path: Path, progress: Progress) -> Iterator[logging.Logger]:
    """The package's logger, writing to ``path`` (appended) for the block.

    Raises:
        ArtifactError: The log cannot be opened.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for someone to read it
        raise ArtifactError("the log is not a plain file", where=path, expected="a file or nothing", hint="remove it")
    logger = logging.getLogger("dynaconv")
    with storage_errors(path):
        path.parent.mkdir(exist_ok=True)
        file = _File(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handlers = (file, _Screen(progress))
    level = logger.level
    logger.setLevel(min(logging.INFO, logger.level or logging.INFO))
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield logger
    finally:
        logger.setLevel(level)
        for handler in handlers:
            logger.removeHandler(handler)
            with suppress(OSError):
                handler.close()
