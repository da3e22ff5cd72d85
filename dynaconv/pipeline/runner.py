"""Runs a recipe's stages on a run folder: keeps what is still right, makes the rest, loses nothing.

Before anything runs, every recorded result is compared with what is asked for (settings, inputs, contents of files),
so a stale or damaged one shows now and not after hours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dynaconv.artifacts.files import size_text, storage_errors, write_json
from dynaconv.artifacts.fingerprint import HEX_SHOWN, fingerprint
from dynaconv.artifacts.manifest import StageRecord
from dynaconv.artifacts.run import WORK_MARK, MadeFor, Run
from dynaconv.artifacts.source import digest, resolve
from dynaconv.config import RunConfig
from dynaconv.errors import ArtifactError, CheckpointError, ConfigError, StaleArtifactError
from dynaconv.memory import peak_rss_bytes, reset_peak
from dynaconv.pipeline.lineage import SOURCE, Link, chain
from dynaconv.pipeline.log import stage_log
from dynaconv.pipeline.plan import checked_stages, data_digest
from dynaconv.pipeline.recipe import recipe_text, settled
from dynaconv.pipeline.stage import Dense, Stage, StageContext
from dynaconv.pipeline.state import KEEP, STALE, judge, judge_all, refuse, refuse_to_lose
from dynaconv.pipeline.status import status
from dynaconv.pipeline.together import Order, in_step
from dynaconv.pipeline.versions import versions
from dynaconv.progress import Progress
from dynaconv.ranks import Ranks, local_world
from dynaconv.threads import Work, choose, given, using

__all__ = ["Outcome", "run_pipeline", "run_stage", "status"]


@dataclass(frozen=True)
class Outcome:
    """What became of one stage: ``made`` now, or kept from before."""

    name: str
    made: bool
    folder: Path
    record: StageRecord


def run_pipeline(
    config: RunConfig,
    run: Run,
    *,
    until: str | None = None,
    redo: str | None = None,
    progress: Progress,
    ranks: Ranks | None = None,
) -> list[Outcome]:
    """Brings ``run`` to where ``config`` wants it.

    Args:
        config: The resolved recipe.
        run: The run.
        until: Last stage to run.
        redo: First stage to make again, with everything after it.
        progress: The display.
        ranks: The processes that run it together, of which this is rank 0; alone by default.

    Raises:
        ConfigError: Lists every mistake in the recipe.
        LockedRunError: Another process works on this run.
        StaleArtifactError: A result, or the unfinished work of an interrupted stage, is for something else; names the
            fields and what to redo.
        ArtifactError: A result is damaged; the disk is full or read-only.
        DynaconvError: Whatever a stage raises. The run is then as it was, and resumable state is kept.
    """
    stages, mistakes = checked_stages(config, until, redo)
    if mistakes:
        raise ConfigError.from_problems(mistakes)
    last = len(stages) if until is None else config.stages.index(until) + 1
    with run.lock() as recovered:
        _say_all(progress, recovered)
        config, source, links = _prepare(config, stages)
        states = judge_all(links[:last], run, full=True, redo=redo)
        refuse(states, run)
        if any(state.action != KEEP for state in states):
            check_shapes(config, stages[:last], source)
        maker = _Maker(config, run, source, progress, len(stages), ranks)
        if not run.recipe.exists():
            run.write_recipe(maker.recipe)
        outcomes = []
        for state in states:
            if state.action == KEEP and state.record is not None:
                progress.say(f"{state.link.position}/{len(stages)} {state.link.name}  kept: {state.reasons[0]}")
                outcomes.append(Outcome(state.link.name, False, run.folder(state.record), state.record))
                continue
            after = () if redo is None else tuple(config.stages[state.link.position :])
            outcomes.append(maker.make(state.link, superseded=after))
        run.write_recipe(maker.recipe)
        return outcomes


def run_stage(
    config: RunConfig, run: Run, name: str, *, redo: bool = False, progress: Progress, ranks: Ranks | None = None
) -> Outcome:
    """Runs one stage of ``run`` with ``config``, on results that are already there. What comes after it turns stale.

    Args:
        config: The run's recipe with what is to be changed.
        run: The run.
        name: The stage.
        redo: Make it again though nothing changed; what came of it is then made again by the next ``convert``.
        progress: The display.
        ranks: The processes that run it together, of which this is rank 0; alone by default.

    Raises:
        ConfigError: Lists every mistake in the recipe, or the run's recipe has no such stage.
        StaleArtifactError: What the stage consumes was made with other settings, or the stage was interrupted and what
            it had done is for other settings.
        ArtifactError: What the stage consumes is missing or damaged; the disk is full or read-only.
    """
    stages, mistakes = checked_stages(config, redo=name)
    if mistakes:
        raise ConfigError.from_problems(mistakes)
    with run.lock() as recovered:
        _say_all(progress, recovered)
        config, source, links = _prepare(config, stages)
        link = next(link for link in links if link.name == name)
        for other in links:
            if other.name in link.inputs.values():
                _require(other, link, run)
        maker = _Maker(config, run, source, progress, len(stages), ranks)
        state = judge(link, run, full=True, redo=redo)
        if state.action == KEEP and state.record is not None:
            progress.say(f"{name}  kept: {state.reasons[0]}")
            outcome = Outcome(name, False, run.folder(state.record), state.record)
        else:
            refuse_to_lose(state, run)
            after = tuple(config.stages[link.position :]) if redo else ()
            outcome = maker.make(link, superseded=after)
        run.write_recipe(maker.recipe)
        return outcome


def _prepare(config: RunConfig, stages: Sequence[Stage]) -> tuple[RunConfig, Path, list[Link]]:
    """The recipe with a source that holds from any folder, where the source is, and the chain of fingerprints."""
    source = resolve(config.source)
    text = data_digest(config) if any("data" in stage.sections for stage in stages) else ""
    return settled(config), source, chain(config, stages, digest(source), text)


def check_shapes(config: RunConfig, stages: Sequence[Stage], source: Path) -> None:
    """Stops before the first stage runs where a later one cannot make the shape it is asked for.

    Raises:
        CheckpointError: ``source`` cannot be used.
        ConfigError: A stage cannot make of it what it should.
    """
    dense: Dense = source
    for stage in stages:
        dense = stage.resized(config, dense)


def _require(needed: Link, link: Link, run: Run) -> None:
    """Stops unless the result of ``needed``, which ``link`` consumes, is there, right and intact."""
    state = judge(needed, run, full=True)
    if state.action == KEEP:
        return
    hint = f"`dynaconv {needed.name} {run.path}` first"
    where = run.path if state.record is None else run.folder(state.record)
    if state.action == STALE:
        what = f"{link.name} needs what {needed.name} makes, and that was made from something else"
        raise StaleArtifactError(what, where=where, found=state.changed, hint=hint)
    what = f"{link.name} needs what {needed.name} makes"
    raise ArtifactError(what, where=where, expected=f"a finished {needed.slot}", found=state.reasons[0], hint=hint)


@dataclass
class _Maker:
    """Runs single stages of one recipe on one run, and publishes what they make."""

    config: RunConfig
    run: Run
    source: Path
    progress: Progress
    count: int
    ranks: Ranks | None = None
    threads: int | None = None  # of the stage before

    @property
    def recipe(self) -> str:
        """Text of ``recipe.yaml``."""
        return recipe_text(self.config)

    def make(self, link: Link, superseded: Sequence[str] = ()) -> Outcome:
        """Runs the stage and publishes its result; ``superseded`` names stages whose results no longer count then."""
        run, name = self.run, link.name
        with (
            storage_errors(run.path),
            stage_log(run.logs / f"{name}.log", self.progress) as log,
            self.progress.in_stage(name, link.position, self.count),
        ):
            log.info("%s begins, fingerprint %s", name, link.fingerprint[:HEX_SHOWN])
            try:
                record = self._run(link, log)
                run.write_recipe(self.recipe)
                run.publish(record, superseded)
            except BaseException:
                log.info("%s did not finish", name, exc_info=True)
                run.discard_staging(link.slot)
                raise
            took = f"{record.seconds:.1f} s, peak memory {size_text(record.peak_rss_bytes)}"
            self.progress.say(f"{link.position}/{self.count} {name}  made {link.slot}: {took}")
        return Outcome(name, True, run.folder(record), record)

    def _run(self, link: Link, log: logging.Logger) -> StageRecord:
        """Runs the stage into its staging folder."""
        inputs = {kind: self._folder(maker) for kind, maker in link.inputs.items()}
        work = self.run.work(link.slot, MadeFor(link.fingerprint, link.fields, link.config, given()))
        staging = self.run.new_staging(link.slot)
        started, began = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
        reset_peak()
        count = self._threads(work, log)
        with using(count):
            metrics = self._together(link, StageContext(self.config, inputs, staging, work, self.progress, log), count)
        consumed = {kind: self._consumed(link, kind) for kind in link.inputs}
        return StageRecord(
            id=f"{link.name}-{link.fingerprint[:HEX_SHOWN]}",
            parents=tuple(identity["id"] for identity in consumed.values()),
            stage=link.name,
            folder=link.slot,
            fingerprint=link.fingerprint,
            fingerprint_fields=dict(link.fields),
            config=dict(link.config),
            inputs=consumed,
            outputs=self.run.outputs(link.slot),
            metrics=metrics,
            versions=versions(),
            started=started,
            seconds=round(time.monotonic() - began, 3),
            peak_rss_bytes=peak_rss_bytes(),
        )

    def _threads(self, work: Path, log: logging.Logger) -> int | None:
        """Chooses how many CPU threads the stage gets, and records it in ``work``; ``None`` leaves torch as it is."""
        made_for = MadeFor.of(work)
        before = None if made_for is None else made_for.threads
        choice = choose(lambda: work_of(self.source), ranks=local_world(), before=before)
        if choice.reason and choice.count != self.threads:
            self.progress.say(choice.reason)
        else:  # as in the stage before: no need to show it again
            log.info("%s", choice.reason or f"{given()} CPU threads, as the environment says")
        self.threads = choice.count
        count = choice.count or given()
        if made_for is not None and count != before:
            write_json(work / WORK_MARK, asdict(replace(made_for, threads=count)))
        return choice.count

    def _together(self, link: Link, context: StageContext, threads: int | None) -> dict[str, Any]:
        """Runs the stage here, and on the other ranks where it wants them."""
        ranks = self.ranks
        if ranks is None or ranks.world == 1 or not link.stage.distributed:
            return link.stage.run(context)
        order = Order(link.name, self.config, context.inputs, context.folder, context.work, threads)
        ranks.broadcast_object(order)
        with in_step(ranks):
            return link.stage.run(replace(context, ranks=ranks))

    def _folder(self, maker: str) -> Path:
        record = self.run.manifest.record(maker)
        return self.source if record is None else self.run.folder(record)

    def _consumed(self, link: Link, kind: str) -> dict[str, str]:
        """Id, fingerprint and hash of the content of the ``kind`` that the stage consumes."""
        record = self.run.manifest.record(link.inputs[kind])
        if record is None:
            content = str(link.fields[f"inputs.{kind}"]).removeprefix(f"{SOURCE}:")
            return {"id": f"{SOURCE}-{content[:HEX_SHOWN]}", "fingerprint": content, "content": content}
        content = fingerprint({output.path: output.sha256 for output in record.outputs})
        return {"id": record.id, "fingerprint": record.fingerprint, "content": content}


def work_of(source: Path) -> Work:
    """Sizes of the matrices of a checkpoint; the usual ones where it cannot be read, which its stage will report."""
    from dynaconv.arch.checkpoint import Checkpoint

    try:
        sizes = Checkpoint.open(source).sizes
    except CheckpointError:
        return Work()
    return Work(hidden=sizes["residual"], ffn=sizes["ffn"])


def _say_all(progress: Progress, lines: Sequence[str]) -> None:
    for line in lines:
        progress.say(line)
