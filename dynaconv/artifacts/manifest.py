"""``manifest.json``: the ledger of a run. Who made what, from what, with which settings and versions.

The ledger is also the journal of publishing: a record stands under ``publishing`` from the moment its folder is
complete until its folder has its place, so that whoever finds it after a crash can finish the job.

A run may come from anywhere, and folders named here are written, moved and deleted. So nothing of a manifest is used
before every field has the right type and every path stays within the run.
"""

from __future__ import annotations

import os
import re
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dynaconv.artifacts.files import read_json, write_json
from dynaconv.artifacts.typed import JsonFile
from dynaconv.errors import ArtifactError

SCHEMA = 1
MANIFEST_FILE = "manifest.json"
STAGE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
LONGEST_NAME, LONGEST_PATH = 255, 2000  # bytes; file systems hold that much and not much more


@dataclass(frozen=True)
class Output:
    """One published file: ``path`` within the stage's folder, size and hex SHA-256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class StageRecord:
    """What a stage did.

    Attributes:
        id: ``name-fingerprint`` with the hash cut short.
        parents: Ids of what it consumed.
        stage: Name of the stage.
        folder: Where its result is, within the run.
        fingerprint: Hash of ``fingerprint_fields``.
        fingerprint_fields: Everything the result depends on, by dotted name.
        config: Resolved sections of the recipe that it declares.
        inputs: What it consumed, by kind: id, fingerprint and a hash over the content.
        outputs: Every file it made.
        metrics: What it measured.
        versions: Of Python and the packages that matter.
        started: UTC, ISO 8601.
        seconds: Duration of its last, completing attempt.
        peak_rss_bytes: High-water mark of resident memory.
        superseded: A stage before it was redone; the next run makes it again without asking.
    """

    id: str
    parents: tuple[str, ...]
    stage: str
    folder: str
    fingerprint: str
    fingerprint_fields: dict[str, Any]
    config: dict[str, Any]
    inputs: dict[str, dict[str, str]]
    outputs: tuple[Output, ...]
    metrics: dict[str, Any]
    versions: dict[str, str]
    started: str
    seconds: float
    peak_rss_bytes: int
    superseded: bool = False


@dataclass
class Manifest:
    """The ledger; :class:`~dynaconv.artifacts.run.Run` is what changes it.

    Attributes:
        id: Names the run.
        stages: Records in the order of the recipe.
        publishing: Record of a result that is complete but may not have its place yet.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    stages: list[StageRecord] = field(default_factory=list)
    publishing: StageRecord | None = None

    def record(self, stage: str) -> StageRecord | None:
        """The record of ``stage``, ``None`` when it has not been run."""
        return next((record for record in self.stages if record.stage == stage), None)

    def save(self, folder: Path) -> None:
        """Writes ``manifest.json`` into ``folder``, atomically.

        Raises:
            ArtifactError: The disk is full, read-only or not accessible.
        """
        write_json(folder / MANIFEST_FILE, {"schema": SCHEMA, **asdict(self)})

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads ``manifest.json`` from ``folder``.

        Raises:
            ArtifactError: It is missing, damaged, leads out of ``folder``, or was written by a newer dynaconv.
        """
        path = folder / MANIFEST_FILE
        content = read_json(path)
        schema = content.get("schema") if isinstance(content, dict) else None
        if type(schema) is int and schema > SCHEMA:
            raise ArtifactError(
                "the run was written by a newer dynaconv",
                where=path,
                expected=f"manifest schema {SCHEMA} or older",
                found=f"schema {schema}",
                hint="upgrade dynaconv, or start a new run with --out",
            )
        hint = f"restore {MANIFEST_FILE} from a copy of the run, or start a new run with --out"
        file = JsonFile(path, "the manifest is damaged or was changed", hint)
        if type(schema) is not int or schema != SCHEMA:
            raise file.wrong("schema", str(SCHEMA), schema)
        missing = next((name for name in ("id", "stages", "publishing") if name not in content), None)
        if missing is not None:
            raise file.wrong(missing, "to be there", "no such field")
        loaded = file.record(cls, {name: value for name, value in content.items() if name != "schema"})
        loaded._check(file)
        return loaded

    def _check(self, file: JsonFile) -> None:
        """Stops at a record that could lead out of the run's folder, and at two of one stage."""
        named = [(f"stages[{i}]", record) for i, record in enumerate(self.stages)]
        for field_name, record in [*named, *([("publishing", self.publishing)] if self.publishing else [])]:
            _check_record(file, field_name, record)
        known: set[str] = set()
        for field_name, record in named:
            if record.stage in known:
                raise file.wrong(f"{field_name}.stage", "each stage once", record.stage)
            known.add(record.stage)


def _check_record(file: JsonFile, field_name: str, record: StageRecord) -> None:
    if not STAGE_NAME.fullmatch(record.stage):
        raise file.wrong(f"{field_name}.stage", "a name of letters, digits, - and _", record.stage)
    if not re.fullmatch(rf"[0-9]{{2,4}}-{record.stage}", record.folder):
        expected = f"the name of a folder in the run, NN-{record.stage} with a number for NN"
        raise file.wrong(f"{field_name}.folder", expected, record.folder)
    for name in ("seconds", "peak_rss_bytes"):
        if getattr(record, name) < 0:
            raise file.wrong(f"{field_name}.{name}", "0 or more", getattr(record, name))
    folder = file.path.parent / record.folder
    if folder.is_symlink():
        raise file.wrong(f"{field_name}.folder", "a folder, not a symbolic link", str(folder.readlink()))
    whole = os.path.realpath(folder)
    for i, output in enumerate(record.outputs):
        place, expected = f"{field_name}.outputs[{i}].path", f"the path of a file below {record.folder}"
        if not _is_below(output.path):
            raise file.wrong(place, expected, output.path)
        real = os.path.realpath(folder / output.path)
        if os.path.commonpath([whole, real]) != whole:
            raise file.wrong(place, expected, f"{output.path}, a symbolic link to {real}")


def _is_below(path: str) -> bool:
    """Whether ``path`` is relative, goes down only, and is one that a file system can hold."""
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return False
    plain = all(part not in (b"", b".", b"..") and len(part) <= LONGEST_NAME for part in encoded.split(b"/"))
    return plain and b"\0" not in encoded and len(encoded) <= LONGEST_PATH
