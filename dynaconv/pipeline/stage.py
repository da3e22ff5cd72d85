"""What a stage is: what it reads, what it makes, what it costs, and how it runs.

Artifacts have a kind. A recipe is legal when every stage finds the kinds it consumes among those made before it:

    parent       the source: what results are compared with, and what may teach
    dense        a plain checkpoint folder (the source, or what a resize made)
    importance   what may be left out of a dense checkpoint
    statistics   what profile measured on a dense checkpoint
    dynamic      a carved checkpoint: plain tensors, and dynaconv.json + dynaconv.safetensors beside them
    dials        thresholds and the frontier that calibrate measured on a dynamic checkpoint
    model        an exported folder
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from dynaconv.config import RunConfig
from dynaconv.progress import Progress
from dynaconv.ranks import Ranks

if TYPE_CHECKING:
    from dynaconv.arch.checkpoint import Checkpoint

KINDS = ("parent", "dense", "importance", "statistics", "dynamic", "dials", "model")

Dense: TypeAlias = "Path | Checkpoint"  # a checkpoint's folder, or the shape of one that is not written yet

# Resident size of a process before any tensor (measured; CPU build): Python with torch, and with transformers' models.
TORCH_BYTES = 260 * 10**6
INTERPRETER_BYTES = 420 * 10**6


@dataclass(frozen=True)
class Estimate:
    """What ``plan`` says of a stage before it runs.

    Attributes:
        peak_bytes: Resident memory at the worst instant, without the interpreter and its libraries.
        disk_bytes: What it leaves on disk.
        flops: Floating-point operations in all.
        notes: Lines for the reader, such as the shape that comes out.
    """

    peak_bytes: int = 0
    disk_bytes: int = 0
    flops: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageContext:
    """What a running stage is handed.

    Attributes:
        config: The whole resolved recipe.
        inputs: Folder of each consumed artifact, by kind.
        folder: Empty staging folder; what is here when ``run`` returns is published atomically.
        work: Folder that outlives an interruption, for resumable state; removed once the stage is published.
        progress: The one progress display.
        log: Logger that also writes ``logs/<stage>.log``.
        ranks: The processes that run the stage together; only rank 0 writes to ``folder`` and shows progress.
    """

    config: RunConfig
    inputs: Mapping[str, Path]
    folder: Path
    work: Path
    progress: Progress
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("dynaconv"))
    ranks: Ranks = field(default_factory=Ranks.single)

    @property
    def logs(self) -> Path:
        """Folder for logs, outside of what is published."""
        return self.folder.parent / "logs"


class Stage(ABC):
    """Base of all stages. Subclasses set the class attributes and override :meth:`run`.

    Attributes:
        name: What recipes and commands call it.
        consumes: Kinds it reads; the newest of each kind is handed to :meth:`run`.
        produces: Kind it makes.
        invalidates: Kinds that no longer describe the newest checkpoint once this stage has run.
        sections: Fields of :class:`RunConfig` that its result depends on; they enter the fingerprint.
        distributed: Whether :meth:`run` takes part on every rank; otherwise rank 0 runs it alone.
        library_bytes: Resident size of Python and the libraries it imports, before any tensor.
        unfingerprinted: Dotted fields within ``sections`` that change how, not what (``finetune.save_every``).
    """

    name: ClassVar[str]
    consumes: ClassVar[tuple[str, ...]]
    produces: ClassVar[str]
    invalidates: ClassVar[tuple[str, ...]] = ()
    sections: ClassVar[tuple[str, ...]]
    distributed: ClassVar[bool] = False
    library_bytes: ClassVar[int] = INTERPRETER_BYTES
    unfingerprinted: ClassVar[tuple[str, ...]] = ()

    def problems(self, config: RunConfig) -> list[str]:
        """Mistakes in ``config`` that this stage can see without running, one sentence each."""
        return []

    def estimate(self, config: RunConfig, source: Dense, parent: Dense | None = None) -> Estimate:
        """Cost of running. Reads headers and config.json only.

        Args:
            config: The resolved recipe.
            source: The dense checkpoint that it works on, or what was carved from it.
            parent: The one that the run began with, where a stage before has resized it.
        """
        return Estimate()

    def resized(self, config: RunConfig, source: Dense) -> Dense:
        """The dense checkpoint that later stages will find, known by its shape; ``source`` unless this one makes it."""
        return source

    @abstractmethod
    def run(self, context: StageContext) -> dict[str, Any]:
        """Writes the artifact into ``context.folder`` and returns metrics for the manifest (JSON values)."""
