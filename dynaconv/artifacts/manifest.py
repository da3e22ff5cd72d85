"""``manifest.json``: the ledger of a run. Who made what, from what, with which settings and versions.

The ledger is also the journal of publishing: a record stands under ``publishing`` from the moment its folder is
complete until its folder has its place, so that whoever finds it after a crash can finish the job.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dynaconv.artifacts.files import read_json, write_json
from dynaconv.errors import ArtifactError

SCHEMA = 1
MANIFEST_FILE = "manifest.json"


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

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> StageRecord:
        """From its JSON form."""
        outputs = tuple(Output(**output) for output in content["outputs"])
        return cls(**{**content, "outputs": outputs, "parents": tuple(content["parents"])})


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
            ArtifactError: It is missing, damaged, or was written by a newer dynaconv.
        """
        path = folder / MANIFEST_FILE
        content = read_json(path)
        schema = content.get("schema") if isinstance(content, dict) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise ArtifactError(
                "the run was written by a newer dynaconv",
                where=path,
                expected=f"manifest schema {SCHEMA} or older",
                found=f"schema {schema}",
                hint="upgrade dynaconv, or start a new run with --out",
            )
        try:
            if schema != SCHEMA:
                raise ValueError(f"schema is {schema!r}")
            publishing = content["publishing"]
            return cls(
                id=content["id"],
                stages=[StageRecord.parse(record) for record in content["stages"]],
                publishing=None if publishing is None else StageRecord.parse(publishing),
            )
        except (KeyError, TypeError, ValueError) as error:
            expected = f"schema {SCHEMA} with fields {', '.join(item.name for item in fields(cls))}"
            raise ArtifactError("the manifest is damaged", where=path, expected=expected, found=error) from error
