"""The stages there are, by name. A stage is imported when it is asked for, so listing names costs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from dynaconv.errors import ConfigError, suggest
from dynaconv.pipeline.stage import Stage

STAGES: dict[str, str] = {
    "importance": "dynaconv.profile.importance_stage:ImportanceStage",
    "subclone": "dynaconv.convert.resize_stage:SubcloneStage",
    "hyperclone": "dynaconv.convert.resize_stage:HypercloneStage",
    "profile": "dynaconv.profile.stage:ProfileStage",
    "carve": "dynaconv.convert.stage:CarveStage",
    "finetune": "dynaconv.train.stage:FinetuneStage",
    "calibrate": "dynaconv.calibrate.stage:CalibrateStage",
    "export": "dynaconv.export.stage:ExportStage",
}


def names() -> tuple[str, ...]:
    """Names of all stages, in the usual order."""
    return tuple(STAGES)


def load(name: str) -> Stage:
    """The stage called ``name``.

    Raises:
        ConfigError: There is no such stage.
    """
    if name not in STAGES:
        raise ConfigError(unknown(name))
    module, _, attribute = STAGES[name].partition(":")
    stage: Stage = getattr(import_module(module), attribute)()
    return stage


def unknown(name: str) -> str:
    """What to say of a stage that does not exist."""
    return f"there is no stage {name!r}; {suggest(name, STAGES)}"


def load_all(wanted: Sequence[str]) -> tuple[list[Stage], list[str]]:
    """The stages of a recipe in order, and a sentence for each name that is no stage."""
    stages = [load(name) for name in wanted if name in STAGES]
    return stages, [unknown(name) for name in wanted if name not in STAGES]


def makers(kind: str) -> list[str]:
    """Names of the stages that make artifacts of ``kind``."""
    return [name for name in STAGES if load(name).produces == kind]
