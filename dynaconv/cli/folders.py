"""Which folder of a run, or which model folder, a command is about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dynaconv.artifacts.files import storage_errors
from dynaconv.artifacts.manifest import MANIFEST_FILE
from dynaconv.artifacts.run import Run
from dynaconv.dynamic.layout import LAYOUT_FILE, OPERATING_POINT_FILE, ROUTER_FILE, Layout
from dynaconv.errors import ArtifactError, ConfigError, QualityError
from dynaconv.frontier import (
    FRONTIER_FILE,
    PICTURE_FILE,
    Frontier,
    FrontierError,
    InvalidRequestError,
    UnreachableError,
)

CONFIG_FILE = "config.json"
# Where a run holds a model that can be loaded, the most finished first.
LOADABLE = ("export", "calibrate", "finetune", "carve")


@dataclass(frozen=True)
class Calibrated:
    """A calibrated run or model.

    Attributes:
        folder: What the user named.
        frontier: The measured frontier.
        stored: Where the chosen operating point is kept; ``None`` where no model is exported yet.
        picture: Drawing of the frontier, if there is one.
    """

    folder: Path
    frontier: Frontier
    stored: Path | None
    picture: Path | None


def find_calibrated(path: Path) -> Calibrated:
    """The frontier of the run or model at ``path``.

    Raises:
        ArtifactError: ``path`` is neither, or was not calibrated yet.
    """
    folder = path.expanduser()
    if (folder / MANIFEST_FILE).is_file():
        return _of_run(folder)
    layout = read_layout(folder)
    if layout.frontier is None:
        hint = "dynaconv calibrate RUN, then dynaconv export RUN"
        raise ArtifactError("this model was not calibrated", where=folder, hint=hint)
    return _calibrated(folder, layout.frontier, folder / OPERATING_POINT_FILE, folder / PICTURE_FILE)


def _of_run(folder: Path) -> Calibrated:
    run = Run.open(folder)
    record = run.manifest.record("calibrate")
    if record is None:
        hint = f"dynaconv calibrate {folder}"
        raise ArtifactError("this run was not calibrated yet", where=folder, hint=hint)
    measured = run.folder(record)
    exported = run.manifest.record("export")
    stored = run.folder(exported) / OPERATING_POINT_FILE if exported is not None else None
    with storage_errors(measured), frontier_errors():
        frontier = Frontier.load(measured / FRONTIER_FILE)
    return _calibrated(folder, frontier, stored, measured / PICTURE_FILE)


def _calibrated(folder: Path, frontier: Frontier, stored: Path | None, picture: Path) -> Calibrated:
    return Calibrated(folder, frontier, stored, picture if picture.is_file() else None)


@contextmanager
def frontier_errors(where: object | None = None) -> Iterator[None]:
    """Turns what a frontier refuses, which knows nothing of exit codes, into the errors of the command line.

    Args:
        where: What to name where the error names no file.

    Raises:
        ConfigError: A share or quality is out of its range.
        QualityError: None of the measured points reaches it.
        ArtifactError: The frontier is missing or damaged.
    """
    try:
        yield
    except FrontierError as error:
        kind = {InvalidRequestError: ConfigError, UnreachableError: QualityError}.get(type(error), ArtifactError)
        raise kind(
            error.what, where=error.where or where, expected=error.expected, found=error.found, hint=error.hint
        ) from error


def model_folder(path: Path) -> Path:
    """The folder to load a dynamic model from: ``path`` itself, or the most finished one of the run at ``path``.

    Raises:
        ArtifactError: ``path`` holds no dynamic model.
    """
    folder = path.expanduser()
    if not (folder / MANIFEST_FILE).is_file():
        read_layout(folder)
        return folder
    run = Run.open(folder)
    for stage in LOADABLE:
        record = run.manifest.record(stage)
        if record is not None and (run.folder(record) / CONFIG_FILE).is_file():
            return run.folder(record)
    raise ArtifactError("this run holds no model yet", where=folder, hint=f"dynaconv convert {folder}")


def scored_folder(path: Path) -> Path:
    """As :func:`model_folder`; a dense checkpoint will do too.

    Raises:
        ArtifactError: ``path`` holds no model.
    """
    folder = path.expanduser()
    dense = (folder / CONFIG_FILE).is_file() and not (folder / LAYOUT_FILE).is_file()
    return folder if dense else model_folder(folder)


def check_weights(folder: Path) -> None:
    """Looks at everything but the weights' values, so that a damaged folder gets one clear message.

    Raises:
        CheckpointError: Tensors are missing, truncated or of another shape than ``config.json`` says.
        ArtifactError: The routers are missing or damaged.
    """
    from dynaconv.arch.checkpoint import Checkpoint
    from dynaconv.artifacts.tensors import read_tensors

    Checkpoint.open(folder)
    if (folder / LAYOUT_FILE).is_file() and read_layout(folder).router.kind != "none":
        read_tensors(folder / ROUTER_FILE)


def read_layout(folder: Path) -> Layout:
    """The layout of a model folder.

    Raises:
        ArtifactError: ``folder`` was not made by dynaconv, or by a newer one.
    """
    if not folder.is_dir():
        raise ArtifactError("no such folder", where=folder, expected="a run or a model that dynaconv made")
    try:
        return Layout.load(folder)
    except FileNotFoundError as error:
        hint = "dynaconv convert makes one from a dense checkpoint"
        raise ArtifactError(
            "neither a run nor a dynamic model", where=folder, expected=f"{MANIFEST_FILE} or {LAYOUT_FILE}", hint=hint
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError("the layout cannot be read", where=folder / LAYOUT_FILE, found=error) from error
