"""What a run holds, without reading weights or text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dynaconv import recipes
from dynaconv.artifacts.manifest import Manifest, StageRecord
from dynaconv.artifacts.run import Run
from dynaconv.errors import ConfigError
from dynaconv.pipeline import registry
from dynaconv.pipeline.lineage import DATA_FIELD, SOURCE, Link, chain, order_problems
from dynaconv.pipeline.state import DAMAGED, KEEP, MAKE, STALE, UNFINISHED, judge

DONE, PENDING, INTERRUPTED = "done", "pending", "interrupted"


def status(run: Run) -> dict[str, Any]:
    """Every stage of the run's recipe: ``done``, ``stale``, ``pending``, ``damaged`` or ``interrupted``.

    The source and the text are taken to be what they were; files are compared by size. ``dynaconv convert`` compares
    everything. Where this dynaconv cannot read the run's recipe, ``problem`` says why, and the stages are those of the
    manifest, all ``stale``: what they made can still be used, but the run cannot be continued.
    """
    if not run.recipe.is_file():
        return {"stages": [], "locked_by": run.locked_by()}
    try:
        config = recipes.draft_of(run.recipe).checked()
    except ConfigError as error:
        rows = [_recorded_row(record, STALE) for record in run.manifest.stages]
        return {"stages": rows, "locked_by": run.locked_by(), "problem": str(error)}
    stages = [registry.load(name) for name in config.stages]
    source, text = _recorded(run.manifest)
    links = chain(config, stages, source, text) if not order_problems(stages) else []
    return {"stages": [_row(link, run) for link in links], "locked_by": run.locked_by()}


def _recorded(manifest: Manifest) -> tuple[str, str]:
    """Digests of the source and of the text, from the first stages that recorded them."""
    fields = [record.fingerprint_fields for record in manifest.stages]
    sources = [str(value) for values in fields for name, value in values.items() if name.startswith("inputs.")]
    source = next((value.removeprefix(f"{SOURCE}:") for value in sources if value.startswith(f"{SOURCE}:")), "")
    return source, next((str(values[DATA_FIELD]) for values in fields if DATA_FIELD in values), "")


def _row(link: Link, run: Run) -> dict[str, Any]:
    state = judge(link, run, full=False)
    record = state.record
    unmade = PENDING if record is None else STALE
    named = {KEEP: DONE, STALE: STALE, DAMAGED: DAMAGED, MAKE: unmade, UNFINISHED: INTERRUPTED}[state.action]
    if named in (PENDING, STALE) and run.was_interrupted(link.slot):
        named = INTERRUPTED
    reasons = [] if named == DONE else list(state.reasons)
    if record is not None:
        return _recorded_row(record, named, reasons)
    nothing: dict[str, Any] = {
        "fingerprint": None,
        "outputs": [],
        "metrics": {},
        "seconds": None,
        "peak_rss_bytes": None,
    }
    return {"name": link.name, "status": named, **nothing, "reasons": reasons}


def _recorded_row(record: StageRecord, named: str, reasons: Sequence[str] = ()) -> dict[str, Any]:
    return {
        "name": record.stage,
        "status": named,
        "fingerprint": record.fingerprint,
        "outputs": _outputs(record.folder, asdict(record)["outputs"]),
        "metrics": record.metrics,
        "seconds": record.seconds,
        "peak_rss_bytes": record.peak_rss_bytes,
        "reasons": list(reasons),
    }


def _outputs(folder: str, outputs: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
    """Outputs with paths within the run."""
    return [{**output, "path": f"{folder}/{output['path']}"} for output in outputs]
