"""Whether a stage's recorded result is what the recipe asks for now: kept, to be made, stale or damaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynaconv.artifacts.manifest import StageRecord
from dynaconv.artifacts.run import Run
from dynaconv.errors import ArtifactError, StaleArtifactError
from dynaconv.pipeline.lineage import Link, changes

KEEP, MAKE, STALE, DAMAGED = "keep", "make", "stale", "damaged"


@dataclass(frozen=True)
class State:
    """What is to be done with one stage.

    Attributes:
        link: The stage in its place.
        action: ``keep``, ``make``, ``stale`` or ``damaged``.
        record: What the ledger says of it, if anything.
        reasons: Why: the fields that changed (``field: old -> new``), the file that is damaged, or one sentence.
    """

    link: Link
    action: str
    record: StageRecord | None
    reasons: tuple[str, ...]


def judge(link: Link, run: Run | None, *, full: bool, redo: bool = False) -> State:
    """Compares what the ledger and the disk hold for ``link`` with what the recipe asks for.

    Args:
        link: The stage in its place.
        run: The run, ``None`` when it does not exist yet.
        full: Compare the contents of its files, not only their sizes.
        redo: It is to be made again whatever there is.
    """
    record = None if run is None else run.manifest.record(link.name)
    if run is None or record is None:
        return State(link, MAKE, None, ("not made yet",))
    if redo:
        return State(link, MAKE, record, ("asked to redo",))
    if record.superseded:
        return State(link, MAKE, record, ("a stage before it was redone",))
    if record.fingerprint != link.fingerprint:
        return State(link, STALE, record, tuple(changes(record, link)))
    damage = run.damage(record, full=full)
    if damage is not None:
        return State(link, DAMAGED, record, (damage,))
    return State(link, KEEP, record, ("same settings and inputs, files intact",))


def judge_all(links: Sequence[Link], run: Run | None, *, full: bool, redo: str | None = None) -> list[State]:
    """States of all ``links``; those from the stage ``redo`` on are to be made again."""
    names = [link.name for link in links]
    first = len(links) if redo is None else names.index(redo)
    return [judge(link, run, full=full, redo=i >= first) for i, link in enumerate(links)]


def refuse(states: Sequence[State], run: Run) -> None:
    """Stops before anything runs when a result is stale or damaged.

    Raises:
        StaleArtifactError: Names the fields that changed and the stage to redo.
        ArtifactError: Names the damaged file and the stage to redo.
    """
    for state in states:
        name = state.link.name
        where = run.folder(state.record) if state.record else run.path
        if state.action == STALE:
            raise StaleArtifactError(
                f"{name} was made from something else than what is asked for now",
                where=where,
                found="changed (then -> now)" + "".join(f"\n    {reason}" for reason in state.reasons),
                hint=f"--redo {name} to make it and everything after it again; or a new run with --out",
            )
        if state.action == DAMAGED:
            hint = f"--redo {name} to make it and everything after it again"
            raise ArtifactError(f"a file that {name} made is damaged", where=where, found=state.reasons[0], hint=hint)
