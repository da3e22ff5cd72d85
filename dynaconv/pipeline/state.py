"""Whether a stage's result is what the recipe asks for now: kept, to be made, stale, damaged or begun otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynaconv.artifacts.manifest import StageRecord
from dynaconv.artifacts.run import Run
from dynaconv.errors import ArtifactError, StaleArtifactError
from dynaconv.pipeline.lineage import Link, changes

KEEP, MAKE, STALE, DAMAGED, UNFINISHED = "keep", "make", "stale", "damaged", "unfinished"


@dataclass(frozen=True)
class State:
    """What is to be done with one stage.

    Attributes:
        link: The stage in its place.
        action: ``keep``, ``make``, ``stale``, ``damaged`` or ``unfinished``: it was interrupted, and what it had done
            belongs to other settings or inputs than the recipe's now.
        record: What the ledger says of it, if anything.
        reasons: Why: the fields that changed (``field: old -> new``), the file that is damaged, or one sentence.
    """

    link: Link
    action: str
    record: StageRecord | None
    reasons: tuple[str, ...]

    @property
    def changed(self) -> str:
        """The fields that changed, a line each, as errors say it."""
        return "changed (then -> now)" + "".join(f"\n    {reason}" for reason in self.reasons)


def judge(link: Link, run: Run | None, *, full: bool, redo: bool = False) -> State:
    """Compares what the ledger and the disk hold for ``link`` with what the recipe asks for.

    Args:
        link: The stage in its place.
        run: The run, ``None`` when it does not exist yet.
        full: Compare the contents of its files, not only their sizes.
        redo: It is to be made again whatever there is.
    """
    record = None if run is None else run.manifest.record(link.name)
    begun = None if run is None else run.unfinished(link.slot)
    if redo and (record or begun):
        return State(link, MAKE, record, ("asked to redo",))
    if begun is not None and begun.fingerprint != link.fingerprint and not _made(record, link):
        return State(link, UNFINISHED, record, tuple(changes(begun.fields, begun.config, link)))
    if run is None or record is None:
        return State(link, MAKE, None, ("not made yet" if begun is None else "interrupted: goes on where it was",))
    if record.superseded:
        return State(link, MAKE, record, ("a stage before it was redone",))
    if record.fingerprint != link.fingerprint:
        return State(link, STALE, record, tuple(changes(record.fingerprint_fields, record.config, link)))
    damage = run.damage(record, full=full)
    if damage is not None:
        return State(link, DAMAGED, record, (damage,))
    return State(link, KEEP, record, ("same settings and inputs, files intact",))


def _made(record: StageRecord | None, link: Link) -> bool:
    """Whether ``record`` is what ``link`` asks for, so that nothing is begun."""
    return record is not None and not record.superseded and record.fingerprint == link.fingerprint


def judge_all(links: Sequence[Link], run: Run | None, *, full: bool, redo: str | None = None) -> list[State]:
    """States of all ``links``; those from the stage ``redo`` on are to be made again."""
    names = [link.name for link in links]
    first = len(links) if redo is None else names.index(redo)
    return [judge(link, run, full=full, redo=i >= first) for i, link in enumerate(links)]


def refuse(states: Sequence[State], run: Run) -> None:
    """Stops before anything runs when a result is stale or damaged, or unfinished work would be lost.

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
                found=state.changed,
                hint=f"--redo {name} to make it and everything after it again; or a new run with --out",
            )
        refuse_to_lose(state, run)
        if state.action == DAMAGED:
            hint = f"--redo {name} to make it and everything after it again"
            raise ArtifactError(f"a file that {name} made is damaged", where=where, found=state.reasons[0], hint=hint)


def refuse_to_lose(state: State, run: Run) -> None:
    """Stops when the unfinished work of a stage does not belong to what is asked for now.

    Raises:
        StaleArtifactError: Names the fields that changed.
    """
    if state.action == UNFINISHED:
        name = state.link.name
        raise StaleArtifactError(
            f"{name} was interrupted, and what it had done is for something else than what is asked for now",
            where=run.path,
            found=state.changed,
            hint=f"change that back to go on; --redo {name} to begin {name} again; or a new run with --out",
        )
