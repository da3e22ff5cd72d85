"""The ``export`` stage: a folder that other tools load."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from typing import Any

from dynaconv.artifacts.files import read_json
from dynaconv.artifacts.source import shown_name
from dynaconv.config import RunConfig
from dynaconv.pipeline.stage import Dense, Estimate, Stage, StageContext

TARGETS = {"hf": "dynaconv.export.hf"}
"""Modules by the name that recipes use. Each has ``write`` and ``check``, as in ``hf``."""


class ExportStage(Stage):
    """Writes the target's folder, reloads it in a clean process and compares."""

    name = "export"
    consumes = ("dynamic", "dials")
    produces = "model"
    sections = ("export",)
    unfingerprinted = ("export.check",)

    def estimate(self, config: RunConfig, source: Dense, parent: Dense | None = None) -> Estimate:
        """A copy of the weights; two loads of them while checking."""
        from dynaconv.arch.checkpoint import Checkpoint

        size = Checkpoint.open(source).reader.total_bytes
        return Estimate(peak_bytes=2 * size if config.export.check else 64 << 20, disk_bytes=size)

    def run(self, context: StageContext) -> dict[str, Any]:
        """Writes and checks."""
        from dynaconv.dynamic.layout import Layout

        config, dynamic, dials = context.config, context.inputs["dynamic"], context.inputs["dials"]
        target = import_module(TARGETS[config.export.target])
        with context.progress.task("export", total=2, unit="steps") as task:
            target.write(
                dynamic,
                dials,
                context.folder,
                parent=shown_name(config.source),
                lineage=lineage(context),
                training=asdict(config.finetune) if "finetune" in config.stages else {},
            )
            task.advance(note="written")
            if not config.export.check:
                return {"checked": False}
            dial = Layout.load(context.folder).dial
            differences = target.check(context.folder, dial.budgets[len(dial.budgets) // 2] if dial else 1.0)
            task.advance(note="reloaded and compared")
        return {"checked": True, "differences": differences}


def lineage(context: StageContext) -> dict[str, Any]:
    """Source and the fingerprints of the stages so far, from the run's manifest."""
    manifest = context.folder.parent / "manifest.json"
    records = read_json(manifest)["stages"] if manifest.is_file() else []
    return {
        "source": context.config.source,
        "stages": {record["stage"]: record["fingerprint"] for record in records if record["stage"] != ExportStage.name},
    }
