"""What in a run folder is the run's own, so that nothing else is ever moved, deleted or written to.

A run may come from anywhere: its manifest may name any path, and there may be symbolic links in it.
"""

from __future__ import annotations

import re
from pathlib import Path

from dynaconv.artifacts.files import storage_errors
from dynaconv.errors import ArtifactError

WORK, LOGS, STAGING, OLD = ".work", "logs", ".staging-", ".old-"
SLOT = re.compile(r"[0-9]{2,4}-[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")  # folder of a stage's result: 02-carve
UNKNOWN = re.compile(rf"{SLOT.pattern}\.unknown-[0-9]+")  # what stood in its place and is not of the run
PARTIAL = re.compile(r"\.(manifest\.json|recipe\.yaml)\.[0-9]+\.partial")


def own(run: Path, path: Path) -> Path:
    """``path`` itself, once it is certain that moving or removing it touches nothing outside the folder ``run``.

    The manifest is checked when it is read; this holds whatever a caller passes.

    Raises:
        ArtifactError: It is no direct entry of ``run`` or of its ``.work``, has a name that a run does not give, or one
            of the two is a symbolic link.
    """
    slot = SLOT.fullmatch(path.name if path.parent == run / WORK else _without_prefix(path.name))
    if path.parent not in (run, run / WORK) or not (
        slot or UNKNOWN.fullmatch(path.name) or PARTIAL.fullmatch(path.name)
    ):
        expected = f"a stage's folder in {run}, such as 02-carve"
        raise ArtifactError("this is not the run's own to change", where=path, expected=expected)
    refuse_link(run / WORK)
    refuse_link(path)
    return path


def leftovers(run: Path, prefix: str) -> list[Path]:
    """Entries of ``run`` that are called ``prefix`` and the name of a stage's folder."""
    return [path for path in run.glob(f"{prefix}*") if SLOT.fullmatch(path.name.removeprefix(prefix))]


def refuse_links(run: Path) -> None:
    """Stops at a symbolic link where a run keeps, moves or deletes folders and files of its own.

    Raises:
        ArtifactError: Names the link and where it leads.
    """
    with storage_errors(run):
        for entry in run.iterdir():
            if entry.name in (WORK, LOGS) or SLOT.fullmatch(_without_prefix(entry.name)):
                refuse_link(entry)
        for name in (WORK, LOGS):
            for entry in (run / name).iterdir() if (run / name).is_dir() else ():
                refuse_link(entry)


def refuse_link(path: Path) -> None:
    """Stops where ``path`` is a symbolic link.

    Raises:
        ArtifactError: Names the link and where it leads.
    """
    if path.is_symlink():
        raise ArtifactError(
            "a symbolic link stands where a run keeps what it made",
            where=path,
            expected="a file or folder in the run itself",
            found=f"a link to {path.readlink()}",
            hint="put what it leads to in its place, or start a new run with --out",
        )


def _without_prefix(name: str) -> str:
    return name.removeprefix(STAGING).removeprefix(OLD)
