"""What a run would do and cost, and every mistake at once, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from dynaconv.artifacts.files import free_bytes, size_text
from dynaconv.artifacts.run import Run, slot
from dynaconv.artifacts.source import digest
from dynaconv.config import RunConfig
from dynaconv.errors import ConfigError, DynaconvError, suggest
from dynaconv.memory import available_bytes
from dynaconv.pipeline import registry
from dynaconv.pipeline.lineage import chain, order_problems
from dynaconv.pipeline.stage import Dense, Estimate, Stage
from dynaconv.pipeline.state import MAKE, State, judge_all
from dynaconv.rules import problems as config_problems

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class StagePlan:
    """One stage of a plan.

    Attributes:
        name: The stage.
        folder: Its folder in the run.
        consumes: Kinds it reads.
        produces: Kind it makes.
        action: ``keep``, ``make``, ``stale`` or ``damaged``.
        reasons: Why, such as the fields that changed (``field: old -> new``).
        estimate: What it costs when it runs.
        peak_bytes: Resident memory at its worst instant in a process of its own, Python and libraries included.
    """

    name: str
    folder: str
    consumes: tuple[str, ...]
    produces: str
    action: str
    reasons: tuple[str, ...]
    estimate: Estimate
    peak_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        stages: In order; empty where the recipe is too wrong to tell.
        problems: Every mistake, one sentence or message each.
        exit_code: What the command ends with: 0, or that of the first problem.
        warnings: What does not stop the run but may.
    """

    stages: tuple[StagePlan, ...]
    problems: tuple[str, ...]
    exit_code: int
    warnings: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """Resident memory at the worst instant of all stages that would run, interpreter and libraries included."""
        return max((stage.peak_bytes for stage in self.to_run), default=0)

    @property
    def disk_bytes(self) -> int:
        """What the stages that would run leave on disk."""
        return sum(stage.estimate.disk_bytes for stage in self.to_run)

    @property
    def flops(self) -> float:
        """Floating-point operations of all stages that would run."""
        return sum(stage.estimate.flops for stage in self.to_run)

    @property
    def to_run(self) -> tuple[StagePlan, ...]:
        """Stages that would run, if need be after ``--redo``."""
        return tuple(stage for stage in self.stages if stage.action != "keep")


def make_plan(
    config: RunConfig, run: Run | None, source: Path, *, until: str | None = None, redo: str | None = None
) -> Plan:
    """Checks everything that can be checked without running, and adds up what running costs. Writes nothing.

    Args:
        config: The resolved recipe.
        run: The run to go on with, ``None`` for a new one.
        source: Folder of the dense checkpoint.
        until: Last stage to run.
        redo: First stage to make again.
    """
    stages, mistakes = checked_stages(config, until, redo)
    errors: list[DynaconvError] = [ConfigError(mistake) for mistake in mistakes]
    if until in config.stages:
        stages = stages[: config.stages.index(until) + 1]
    estimates, dense = [], cast(Dense, source)
    for stage in stages:
        estimates.append(_attempt(errors, partial(stage.estimate, config, dense, source)) or Estimate())
        dense = _attempt(errors, partial(stage.resized, config, dense)) or dense
    # The source is hashed only where there is something to compare with.
    hashed = _attempt(errors, partial(digest, source)) if run is not None and run.begun else ""
    text = _attempt(errors, partial(data_digest, config)) if any("data" in stage.sections for stage in stages) else ""
    states: list[State] | None = None
    if not mistakes and hashed is not None and text is not None:
        states = judge_all(chain(config, stages, hashed, text), run, full=False, redo=redo)
    plans = tuple(
        _stage_plan(stage, i, estimates[i], states[i] if states is not None else None) for i, stage in enumerate(stages)
    )
    told = tuple(dict.fromkeys(str(error) for error in errors))
    plan = Plan(plans, told, errors[0].exit_code if errors else 0)
    return replace(plan, warnings=_warnings(plan, run))


def _attempt(errors: list[DynaconvError], ask: Callable[[], Answer]) -> Answer | None:
    """What ``ask`` answers; ``None`` when it fails, with the reason added to ``errors``."""
    try:
        return ask()
    except DynaconvError as error:
        errors.append(error)
    except Exception:
        if not errors:  # with a mistake in the recipe, any arithmetic on it may fail: the mistake is what to tell
            raise
    return None


def _stage_plan(stage: Stage, i: int, estimate: Estimate, state: State | None) -> StagePlan:
    action, reasons = (state.action, state.reasons) if state is not None else (MAKE, ("not known",))
    peak = stage.library_bytes + estimate.peak_bytes
    folder = slot(i + 1, stage.name)
    return StagePlan(stage.name, folder, stage.consumes, stage.produces, action, reasons, estimate, peak)


def checked_stages(
    config: RunConfig, until: str | None = None, redo: str | None = None
) -> tuple[list[Stage], list[str]]:
    """The recipe's stages, and every mistake that shows without the checkpoint."""
    stages, mistakes = registry.load_all(config.stages)
    mistakes = config_problems(config) + mistakes
    for option, name in (("--until", until), ("--redo", redo)):
        if name is not None and name not in config.stages:
            mistakes.append(f"{option} {name}: this recipe has no such stage; {suggest(name, config.stages)}")
    if until in config.stages and redo in config.stages and _after(config.stages, redo, until):
        mistakes.append(f"--redo {redo} comes after --until {until}: nothing would be redone")
    if len(stages) == len(config.stages):
        mistakes += order_problems(stages)
    errors: list[DynaconvError] = [ConfigError(mistake) for mistake in mistakes]
    for stage in stages:
        mistakes += _attempt(errors, partial(stage.problems, config)) or []
    return stages, list(dict.fromkeys(mistakes))


def _after(stages: Sequence[str], one: str | None, other: str | None) -> bool:
    return list(stages).index(str(one)) > list(stages).index(str(other))


def data_digest(config: RunConfig) -> str:
    """Digest of the text that ``config`` names.

    Raises:
        DataError: There is none.
    """
    from dynaconv.data.digest import digest as digest_of_text

    return digest_of_text(config.data)


def _warnings(plan: Plan, run: Run | None) -> tuple[str, ...]:
    found = []
    available = available_bytes()
    if available is not None and plan.peak_bytes > available:
        peak = size_text(plan.peak_bytes)
        found.append(f"needs up to {peak} of memory; {size_text(available)} are available on this machine")
    free = free_bytes(run.path if run is not None else Path.cwd())
    if plan.disk_bytes > free:
        found.append(f"needs {size_text(plan.disk_bytes)} on disk; {size_text(free)} are free")
    return tuple(found)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values, for ``--json``."""
    stages = [asdict(stage) for stage in plan.stages]
    totals = {"peak_bytes": plan.peak_bytes, "disk_bytes": plan.disk_bytes, "flops": plan.flops}
    return {"stages": stages, "problems": plan.problems, "warnings": plan.warnings, **totals}
