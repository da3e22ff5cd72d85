"""Stages with the names and kinds of the real ones that only move bytes: for tests of the pipeline itself.

They import no torch, so a process that runs them starts quickly and can be killed often. As a script: runs the whole
pipeline on SOURCE in RUN.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

from dynaconv.artifacts.files import atomic_write
from dynaconv.artifacts.manifest import Output, StageRecord
from dynaconv.artifacts.run import Run
from dynaconv.config import RunConfig
from dynaconv.errors import DataError
from dynaconv.pipeline import registry
from dynaconv.pipeline.runner import run_pipeline
from dynaconv.pipeline.stage import Dense, Estimate, Stage, StageContext
from dynaconv.progress import Progress

FILES, STEPS = 3, 8


class FakeStage(Stage):
    """Writes files that are a hash of all inputs and settings; keeps count of its runs in ``calls``."""

    calls: ClassVar[list[str]] = []
    fail: ClassVar[str] = ""  # name of the stage that is to fail
    file_bytes: ClassVar[int] = 2000
    pause: ClassVar[float] = 0.0

    def estimate(self, config: RunConfig, source: Dense, parent: Dense | None = None) -> Estimate:
        return Estimate(peak_bytes=1000, disk_bytes=10, flops=5.0, notes=(Path(str(source)).name,))

    def run(self, context: StageContext) -> dict[str, Any]:
        FakeStage.calls.append(self.name)
        seed = hashlib.sha256()
        for kind in sorted(context.inputs):
            for path in sorted(context.inputs[kind].rglob("*")):
                if path.is_file():
                    seed.update(path.relative_to(context.inputs[kind]).as_posix().encode() + path.read_bytes())
        for name in self.sections:
            seed.update(repr(getattr(context.config, name)).encode())
        context.log.info("%s at work", self.name)
        state = self.steps(context, seed.hexdigest())
        for i in range(FILES):
            path = context.folder / ("deep" if i else ".") / f"part-{i}.bin"
            path.parent.mkdir(exist_ok=True)
            block = hashlib.sha256(f"{state}{i}".encode()).digest()
            path.write_bytes(block * (self.file_bytes // len(block)))
            time.sleep(self.pause)
            if FakeStage.fail == self.name:
                raise DataError("the text is too small")
        return {"steps": STEPS, "loss": 2.5}

    def steps(self, context: StageContext, state: str) -> str:
        """A chain of hashes that is resumed from ``work`` after an interruption."""
        saved = context.work / "state.json"
        start, state = json.loads(saved.read_text()) if saved.exists() else (0, state)
        with context.progress.task(self.name, total=STEPS, unit="steps", done=start) as task:
            for step in range(start, STEPS):
                state = hashlib.sha256(f"{state}{step}".encode()).hexdigest()
                atomic_write(saved, json.dumps([step + 1, state]))
                time.sleep(self.pause)
                task.advance(1)
        return state


class Profile(FakeStage):
    name, consumes, produces, sections = "profile", ("dense",), "statistics", ("seed", "data", "profile")


class Carve(FakeStage):
    name, consumes, produces, sections = "carve", ("dense", "statistics"), "dynamic", ("blocks", "carve")


class Finetune(FakeStage):
    name, consumes, produces, sections = "finetune", ("dense", "dynamic"), "dynamic", ("seed", "finetune")
    invalidates, unfingerprinted = ("dials",), ("finetune.save_every",)


class Calibrate(FakeStage):
    name, consumes, produces, sections = "calibrate", ("dense", "dynamic"), "dials", ("calibrate",)

    def problems(self, config: RunConfig) -> list[str]:
        return ["calibrate.budgets: too many"] if len(config.calibrate.budgets or []) > 50 else []


class Export(FakeStage):
    name, consumes, produces, sections = "export", ("dynamic", "dials"), "model", ("export",)


class Resize(FakeStage):
    name, consumes, produces, sections = "resize", ("dense",), "dense", ("seed",)
    invalidates = ("statistics", "dynamic", "dials")


FAKES = {cls.name: f"{__name__}:{cls.__name__}" for cls in (Profile, Carve, Finetune, Calibrate, Export, Resize)}
USUAL = ["profile", "carve", "finetune", "calibrate", "export"]


def make_source(folder: Path) -> Path:
    """Something that counts as a checkpoint folder as far as its digest goes."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder.parent / "text.txt").write_text("some text\n" * 50)
    return folder


def make_config(source: Path, stages: list[str] | None = None) -> RunConfig:
    """A recipe of fake stages on ``source`` and the text beside it."""
    config = RunConfig(source=str(source), experts="nested", blocks=64, stages=list(stages or USUAL))
    config.data.train = [str(source.parent / "text.txt")]
    return config


def sample_record(stage: str = "carve", folder: str = "02-carve") -> StageRecord:
    """A record with something in every field."""
    return StageRecord(
        id=f"{stage}-abc",
        parents=("source-1", "profile-2"),
        stage=stage,
        folder=folder,
        fingerprint="abc",
        fingerprint_fields={"blocks": 8, "inputs.dense": "source:1"},
        config={"blocks": 8, "carve": {"ridge": 0.001}},
        inputs={"dense": {"id": "source-1", "fingerprint": "1", "content": "1"}},
        outputs=(Output("deep/a.bin", 3, "00"), Output("b.json", 4, "11")),
        metrics={"loss": 2.5, "widths": [1, 2]},
        versions={"python": "3.11"},
        started="2026-01-01T00:00:00+00:00",
        seconds=1.5,
        peak_rss_bytes=10**9,
    )


def contents(run: Path) -> dict[str, str]:
    """SHA-256 of every published file of the run at ``run``, by path within it."""
    folders = [folder for folder in run.glob("[0-9][0-9]-*") if folder.is_dir()]
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def leftovers(run: Path) -> list[str]:
    """What should not be left in a run folder once it is finished."""
    found = [*run.glob(".staging-*"), *run.glob(".old-*"), *run.glob(".work/*"), *run.rglob(".*.partial")]
    return sorted(path.name for path in [*found, *run.glob("*.unknown-*")])


if __name__ == "__main__":
    registry.STAGES = FAKES
    FakeStage.pause = float(sys.argv[3])
    print("begins", flush=True)
    with Progress(quiet=True) as display:
        run_pipeline(make_config(Path(sys.argv[1])), Run.create(sys.argv[2]), progress=display)
