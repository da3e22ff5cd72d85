"""A run's folder: where everything is, and how a result gets its place without ever being half there.

    manifest.json  recipe.yaml  logs/  01-profile/  02-carve/ ...      what is published
    .lock  .work/02-carve/  .staging-02-carve/  .old-02-carve/         what is in between

Publishing: the staging folder is complete and flushed; the manifest says ``publishing``; the old result moves to
``.old-*``; staging takes its name; work is removed; the manifest records the result; the old one is removed. Killed
after the manifest said so, the next process finishes the job; killed before, it removes the staging folder.

Whatever the manifest says and whatever lies in the folder, only what a run made itself is moved, deleted or written to:
names that nothing here gives are left alone, and a run with symbolic links in these places is refused.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dynaconv.artifacts.boundary import LOGS, OLD, PARTIAL, STAGING, WORK, leftovers, own, refuse_link, refuse_links
from dynaconv.artifacts.files import atomic_write, fsync_tree, read_json, sha256, storage_errors, sync_file, write_json
from dynaconv.artifacts.lock import exclusive, holder
from dynaconv.artifacts.manifest import MANIFEST_FILE, Manifest, Output, StageRecord
from dynaconv.artifacts.source import USER_STATE
from dynaconv.artifacts.typed import JsonFile
from dynaconv.errors import ArtifactError

RECIPE_FILE = "recipe.yaml"
WORK_MARK = ".made-for.json"


@dataclass(frozen=True)
class MadeFor:
    """What the resumable state of an unfinished stage belongs to.

    Attributes:
        fingerprint: Of the settings and inputs.
        fields: Those, by dotted name.
        config: The settings, nested as in the recipe.
        threads: CPU threads it is made with, once they are chosen: another number can change the last bits.
    """

    fingerprint: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None

    @classmethod
    def of(cls, work: Path) -> MadeFor | None:
        """What the folder ``work`` belongs to; ``None`` where there is no folder or it does not say.

        Raises:
            ArtifactError: It says so in a file that is damaged.
        """
        mark = work / WORK_MARK
        if not mark.is_file():
            return None
        hint = f"remove {work} to begin the stage again"
        return JsonFile(mark, "the state of an unfinished stage is damaged", hint).record(cls, read_json(mark))


def slot(position: int, stage: str) -> str:
    """Name of the folder of the stage at ``position`` (from 1): ``"02-carve"``."""
    return f"{position:02}-{stage}"


class Run:
    """A run folder and its ledger.

    Attributes:
        path: The folder.
        manifest: The ledger as last read or written.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run at ``path``.

        Raises:
            ArtifactError: There is none, its manifest is damaged or newer than this dynaconv, or it leads out of the
                folder.
        """
        folder = Path(path).expanduser().absolute()
        if not (folder / MANIFEST_FILE).is_file():
            what = "this folder is not a run" if folder.is_dir() else "no run here"
            hint = f"start one with `dynaconv convert SOURCE --out {path}`"
            raise ArtifactError(what, where=folder, expected=f"a folder with {MANIFEST_FILE}", hint=hint)
        refuse_links(folder)
        return cls(folder, Manifest.load(folder))

    @classmethod
    def create(cls, path: str | Path) -> Run:
        """The run at ``path``, begun if the folder is missing or empty.

        Raises:
            ArtifactError: The folder holds something that is not a run, or cannot be written.
        """
        folder = Path(path).expanduser().absolute()
        if (folder / MANIFEST_FILE).is_file():
            return cls.open(folder)
        with storage_errors(folder):
            if folder.exists() and (not folder.is_dir() or any(item.name[0] != "." for item in folder.iterdir())):
                hint = "choose a new or empty folder with --out"
                raise ArtifactError("there is something here that is not a run", where=folder, hint=hint)
            folder.mkdir(parents=True, exist_ok=True)
        refuse_links(folder)
        run = cls(folder, Manifest())
        run.manifest.save(folder)
        return run

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / RECIPE_FILE

    @property
    def logs(self) -> Path:
        """Folder of plain text logs, one a stage."""
        return self.path / LOGS

    def folder(self, record: StageRecord) -> Path:
        """Where the result of ``record`` is."""
        return self.path / record.folder

    @contextmanager
    def lock(self) -> Iterator[list[str]]:
        """Keeps other processes off; reads the ledger again, and clears up after a process that was killed.

        Yields:
            What was cleared up, one line each.

        Raises:
            LockedRunError: Another process is working on this run.
            ArtifactError: The folder is read-only, or the manifest is damaged.
        """
        with exclusive(self.path / ".lock"):
            refuse_links(self.path)
            self.manifest = Manifest.load(self.path)
            yield self._recover()

    def locked_by(self) -> str | None:
        """Who is working on this run now, ``None`` when nobody is."""
        return holder(self.path / ".lock")

    def write_recipe(self, text: str) -> None:
        """Writes ``recipe.yaml`` unless it says so already."""
        if not self.recipe.is_file() or self.recipe.read_text(encoding="utf-8") != text:
            atomic_write(self.recipe, text)

    def new_staging(self, name: str) -> Path:
        """An empty folder in which the result for the slot ``name`` is put together."""
        folder = self._staging(name)
        with storage_errors(folder):
            self._remove(folder)
            folder.mkdir()
        return folder

    def discard_staging(self, name: str) -> None:
        """Removes what was put together, unless it is being published: then the next process finishes that."""
        if self.manifest.publishing is None:
            shutil.rmtree(own(self.path, self._staging(name)), ignore_errors=True)

    def work(self, name: str, made_for: MadeFor) -> Path:
        """The folder for resumable state of the slot ``name``; emptied when it belongs to something else.

        Raises:
            ArtifactError: The disk is full or failing, or there is a symbolic link in the folder.
        """
        folder = own(self.path, self._work(name))
        with storage_errors(folder):
            known = MadeFor.of(folder)
            if known is None or known.fingerprint != made_for.fingerprint:
                self._remove(folder)
                folder.mkdir(parents=True)
                write_json(folder / WORK_MARK, asdict(made_for))
            for parent, folders, files in os.walk(folder):  # a stage goes on writing to the files that it finds here
                for entry in (*folders, *files):
                    refuse_link(Path(parent, entry))
        return folder

    def unfinished(self, name: str) -> MadeFor | None:
        """What the resumable state of the slot ``name`` belongs to; ``None`` where there is none."""
        folder = self._work(name)
        kept = folder.is_dir() and any(path.name != WORK_MARK for path in folder.iterdir())
        return MadeFor.of(folder) if kept else None

    @property
    def begun(self) -> bool:
        """Whether a stage has a result here, or was interrupted."""
        return bool(self.manifest.stages) or any((self.path / WORK).glob("*"))

    def was_interrupted(self, name: str) -> bool:
        """Whether an attempt at the slot ``name`` began and has not been published."""
        return self._work(name).exists() or self._staging(name).exists()

    def publish(self, record: StageRecord, superseded: Collection[str] = ()) -> None:
        """Gives the staged result its place and records it; the results of stages ``superseded`` no longer count.

        Raises:
            ArtifactError: The disk is full or failing. The run is then as it was, or the next process finishes this.
        """
        fsync_tree(self._staging(record.folder))
        before = self.manifest
        marked = [replace(other, superseded=True) if other.stage in superseded else other for other in before.stages]
        self.manifest = replace(before, stages=marked, publishing=record)
        try:
            self.manifest.save(self.path)
        except BaseException:
            self.manifest = before
            raise
        with storage_errors(self.path):
            self._finish(record)

    def damage(self, record: StageRecord, *, full: bool) -> str | None:
        """What is wrong with the files of ``record``: the first that is missing or differs; ``None`` when intact.

        Args:
            record: A published result.
            full: Compare contents too (SHA-256), not only sizes.
        """
        if not self.folder(record).is_dir():
            return f"{self.folder(record)} is missing"
        for output in record.outputs:
            path = self.folder(record) / output.path
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != output.bytes:
                return f"{path} has {path.stat().st_size} bytes, not {output.bytes}"
            if full and sha256(path) != output.sha256:
                return f"{path} has the right size but other content (SHA-256 differs)"
        return None

    def outputs(self, name: str) -> tuple[Output, ...]:
        """Every file staged for the slot ``name``, hashed."""
        folder = self._staging(name)
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in USER_STATE)
        return tuple(Output(path.relative_to(folder).as_posix(), path.stat().st_size, sha256(path)) for path in paths)

    def _staging(self, name: str) -> Path:
        return self.path / f"{STAGING}{name}"

    def _work(self, name: str) -> Path:
        return self.path / WORK / name

    def _remove(self, path: Path) -> None:
        if own(self.path, path).is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _move(self, path: Path, to: Path) -> None:
        own(self.path, path).rename(own(self.path, to))

    def _finish(self, record: StageRecord) -> None:
        """Second half of publishing; picks up wherever a process was killed in it."""
        staging, final = self._staging(record.folder), self.folder(record)
        previous = self.manifest.record(record.stage)
        if staging.exists():
            self._set_aside(final)
            self._move(staging, final)
            sync_file(self.path)
        if previous is not None and previous.folder != record.folder:  # the recipe gave the stage another number
            self._set_aside(self.folder(previous))
        self._remove(self._work(record.folder))
        others = [other for other in self.manifest.stages if other.stage != record.stage]
        stages = sorted([*others, record], key=lambda other: other.folder)
        self.manifest = replace(self.manifest, stages=stages, publishing=None)
        self.manifest.save(self.path)
        for old in leftovers(self.path, OLD):
            shutil.rmtree(own(self.path, old), ignore_errors=True)

    def _set_aside(self, folder: Path) -> None:
        """Moves a published result to ``.old-*``; a folder that the ledger does not know is kept under a new name."""
        if not os.path.lexists(folder):
            return
        aside = self.path / f"{OLD}{folder.name}"
        if self._knows(folder.name):
            self._remove(aside)
        else:
            names = (self.path / f"{folder.name}.unknown-{count}" for count in itertools.count(1))
            aside = next(name for name in names if not os.path.lexists(name))
        self._move(folder, aside)

    def _knows(self, name: str) -> bool:
        return any(record.folder == name for record in self.manifest.stages)

    def _recover(self) -> list[str]:
        """Finishes or undoes what a killed process left behind; says what it did."""
        said = []
        record = self.manifest.publishing
        with storage_errors(self.path):
            if record is not None and (self._staging(record.folder).exists() or not self.damage(record, full=True)):
                self._finish(record)
                said.append(f"{record.stage}: finished publishing {record.folder}, which was interrupted")
            elif record is not None:
                self.manifest = replace(self.manifest, publishing=None)
                self.manifest.save(self.path)
            for old in leftovers(self.path, OLD):
                final = self.path / old.name.removeprefix(OLD)
                if not final.exists() and self._knows(final.name):
                    self._move(old, final)
                else:
                    self._remove(old)
            partial = [path for path in self.path.glob(".*.partial") if PARTIAL.fullmatch(path.name)]
            for leftover in [*leftovers(self.path, STAGING), *partial]:
                self._remove(leftover)
                said.append(f"removed {leftover.name}, left by an interrupted process")
        return said
