"""Runs keep what is right, refuse what is not, redo what they are told to, and lose nothing when a stage fails."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from fake_stages import FAKES, USUAL, FakeStage, contents, leftovers, make_config, make_source

from dynaconv.artifacts.run import Run
from dynaconv.config import RunConfig
from dynaconv.errors import ArtifactError, ConfigError, DataError, StaleArtifactError
from dynaconv.pipeline import registry
from dynaconv.pipeline.plan import make_plan
from dynaconv.pipeline.runner import run_pipeline, run_stage, status
from dynaconv.progress import Progress
from dynaconv.recipes import draft_of


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr(registry, "STAGES", FAKES)
    monkeypatch.setattr(FakeStage, "calls", [])
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power fails here
    return make_config(make_source(tmp_path / "model"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run")


def go(config: RunConfig, run: Run, **settings: str) -> list[str]:
    """Runs the pipeline in a fresh view of the run, as another process would; returns the stages that ran."""
    FakeStage.calls.clear()
    run_pipeline(config, Run.open(run.path), progress=Progress(quiet=True), **settings)
    return list(FakeStage.calls)


def states(run: Run) -> dict[str, str]:
    return {stage["name"]: stage["status"] for stage in status(Run.open(run.path))["stages"]}


def tree(folder: Path) -> dict[str, bytes]:
    """Everything but logs and the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "logs"]
    return {str(path): path.read_bytes() for path in files if path.name != ".lock"}


def test_everything_once_then_nothing(config: RunConfig, run: Run) -> None:
    assert go(config, run) == USUAL
    before = tree(run.path)
    assert go(config, run) == []
    assert tree(run.path) == before
    assert leftovers(run.path) == []
    assert states(run) == dict.fromkeys(USUAL, "done")


def test_until_then_the_rest(config: RunConfig, run: Run) -> None:
    assert go(config, run, until="carve") == ["profile", "carve"]
    assert states(run)["carve"] == "done"
    assert states(run)["finetune"] == "pending"
    assert go(config, run) == ["finetune", "calibrate", "export"]


def test_the_ledger_says_what_came_from_what(config: RunConfig, run: Run) -> None:
    go(config, run)
    records = {record.stage: record for record in Run.open(run.path).manifest.stages}
    assert list(records) == USUAL
    carve = records["carve"]
    assert carve.parents == (f"source-{carve.inputs['dense']['content'][:12]}", records["profile"].id)
    assert records["calibrate"].inputs["dynamic"]["id"] == records["finetune"].id  # the newest of its kind
    assert carve.config == {"blocks": 64, "carve": asdict(config.carve)}
    assert carve.metrics == {"steps": 8, "loss": 2.5}
    assert {"python", "dynaconv", "torch", "transformers"} <= set(carve.versions)
    assert carve.seconds >= 0
    assert carve.peak_rss_bytes > 10**6
    assert [output.path for output in carve.outputs] == ["deep/part-1.bin", "deep/part-2.bin", "part-0.bin"]
    assert {f"02-carve/{output.path}": output.sha256 for output in carve.outputs}.items() <= contents(run.path).items()


def test_recipe_and_logs_are_beside(config: RunConfig, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    config.data.field = "a${b}"
    monkeypatch.chdir(Path(config.source).parent)
    config.source, config.data.train = "model", ["text.txt"]
    go(config, run)
    monkeypatch.chdir("/")  # the recipe holds from anywhere
    again = draft_of(run.recipe).checked()
    assert again.data.field == "a${b}"
    assert go(again, run) == []
    assert "carve at work" in (run.logs / "carve.log").read_text()
    assert logging.getLogger("dynaconv").handlers == []


def test_stale_names_the_field_and_touches_nothing(config: RunConfig, run: Run) -> None:
    go(config, run)
    before = tree(run.path)
    changed = replace(config, blocks=16)
    with pytest.raises(StaleArtifactError, match="blocks: 64 -> 16") as caught:
        go(changed, run)
    assert "--redo carve" in str(caught.value)
    assert FakeStage.calls == []
    assert tree(run.path) == before
    assert go(changed, run, redo="carve") == USUAL[1:]
    assert go(changed, run) == []


def test_a_field_of_how_not_what_makes_nothing_stale(config: RunConfig, run: Run) -> None:
    go(config, run)
    config.finetune.save_every = 7
    assert go(config, run) == []
    assert draft_of(run.recipe).checked().finetune.save_every == 7


def test_text_elsewhere_with_the_same_content_is_the_same(config: RunConfig, run: Run, tmp_path: Path) -> None:
    go(config, run)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "text.txt").rename(tmp_path / "elsewhere" / "text.txt")
    config.data.train = [str(tmp_path / "elsewhere" / "text.txt")]
    assert go(config, run) == []
    (tmp_path / "elsewhere" / "text.txt").write_text("changed\n" * 50)
    with pytest.raises(StaleArtifactError, match=r"data\.content"):
        go(config, run)


@pytest.mark.parametrize("redo", USUAL)
def test_redo_makes_it_and_all_after_it(config: RunConfig, run: Run, redo: str) -> None:
    go(config, run)
    before = contents(run.path)
    assert go(config, run, redo=redo) == USUAL[USUAL.index(redo) :]
    assert contents(run.path) == before
    assert leftovers(run.path) == []


def test_damage_is_found_whatever_the_size(config: RunConfig, run: Run) -> None:
    go(config, run)
    path = run.path / "02-carve" / "deep" / "part-1.bin"
    content = bytearray(path.read_bytes())
    content[17] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"part-1\.bin") as caught:
        go(config, run)
    assert "--redo carve" in str(caught.value)
    assert FakeStage.calls == []
    path.unlink()
    assert states(run)["carve"] == "damaged"
    with pytest.raises(ArtifactError, match="is missing"):
        go(config, run)
    assert go(config, run, redo="carve") == USUAL[1:]


def test_a_failing_stage_leaves_the_run_as_it_was(config: RunConfig, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    go(config, run)
    before = contents(run.path)
    ledger = (run.path / "manifest.json").read_text()
    recipe = run.recipe.read_text()
    config.blocks = 16
    monkeypatch.setattr(FakeStage, "fail", "carve")
    with pytest.raises(DataError, match="too small"):
        go(config, run, redo="carve")
    assert contents(run.path) == before
    assert (run.path / "manifest.json").read_text() == ledger
    assert run.recipe.read_text() == recipe
    assert not list(run.path.glob(".staging-*"))
    assert (run.path / ".work" / "02-carve" / "state.json").exists()
    assert "too small" in (run.logs / "carve.log").read_text()
    config.blocks = 64
    assert go(config, run) == []


def test_a_failed_stage_goes_on_from_its_work(config: RunConfig, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeStage, "fail", "finetune")
    with pytest.raises(DataError):
        go(config, run)
    assert states(run)["finetune"] == "interrupted"
    saved = run.path / ".work" / "03-finetune" / "state.json"
    step, state = json.loads(saved.read_text())
    saved.write_text(json.dumps([step, "from work" + state]))
    monkeypatch.setattr(FakeStage, "fail", "")
    assert go(config, run) == ["finetune", "calibrate", "export"]
    resumed = contents(run.path)
    assert go(config, run, redo="finetune") == ["finetune", "calibrate", "export"]
    assert contents(run.path) != resumed  # so the first result did come from the saved work


def test_work_of_other_settings_is_lost_only_when_asked(
    config: RunConfig, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = config.finetune.tokens
    monkeypatch.setattr(FakeStage, "fail", "finetune")
    with pytest.raises(DataError):
        go(config, run)
    monkeypatch.setattr(FakeStage, "fail", "")
    before = tree(run.path)
    config.finetune.tokens = 2 * tokens
    refused = rf"finetune was interrupted[\s\S]*finetune.tokens: {tokens} -> {2 * tokens}[\s\S]*--redo finetune"
    with pytest.raises(StaleArtifactError, match=refused):
        go(config, run)
    with pytest.raises(StaleArtifactError, match=refused):
        run_stage(config, run, "finetune", progress=Progress(quiet=True))
    planned = make_plan(config, run, Path(config.source)).stages[2]
    assert planned.action == "unfinished"
    assert f"finetune.tokens: {tokens} -> {2 * tokens}" in planned.reasons
    assert states(run)["finetune"] == "interrupted"
    assert tree(run.path) == before
    config.finetune.tokens = tokens
    goes_on = make_plan(config, run, Path(config.source)).stages[2]
    assert (goes_on.action, goes_on.reasons) == ("make", ("interrupted: goes on where it was",))
    (run.path / ".work" / "03-finetune" / "state.json").write_text("[8, 'read as JSON it would fail']")
    config.finetune.tokens = 2 * tokens
    assert go(config, run, redo="finetune") == ["finetune", "calibrate", "export"]


def test_interrupted_redo_goes_on_without_being_asked_again(
    config: RunConfig, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(config, run)
    config.blocks = 4
    monkeypatch.setattr(FakeStage, "fail", "finetune")
    with pytest.raises(DataError):
        go(config, run, redo="carve")
    assert states(run) == {
        "profile": "done", "carve": "done", "finetune": "interrupted", "calibrate": "stale", "export": "stale"
    }  # fmt: skip
    monkeypatch.setattr(FakeStage, "fail", "")
    assert go(config, run) == ["finetune", "calibrate", "export"]
    assert states(run) == dict.fromkeys(USUAL, "done")


def test_a_stage_put_in_between(config: RunConfig, run: Run) -> None:
    short = replace(config, stages=["profile", "carve", "calibrate", "export"])
    go(short, run)
    with pytest.raises(StaleArtifactError, match=r"inputs\.dynamic: carve:\w+ -> finetune:\w+"):
        go(config, run)
    assert go(config, run, redo="calibrate") == ["finetune", "calibrate", "export"]
    folders = sorted(path.name for path in run.path.glob("0*"))
    assert folders == ["01-profile", "02-carve", "03-finetune", "04-calibrate", "05-export"]
    assert leftovers(run.path) == []


def test_mistakes_are_told_before_anything_runs(config: RunConfig, run: Run) -> None:
    config.stages, config.seed = ["carve", "profile"], -1
    before = tree(run.path)
    with pytest.raises(ConfigError, match="2 mistakes") as caught:
        go(config, run)
    assert "carve needs statistics" in str(caught.value)
    assert tree(run.path) == before
    with pytest.raises(ConfigError, match="--redo nothing"):
        go(make_config(Path(config.source)), run, redo="nothing")


def test_one_stage_with_other_settings(config: RunConfig, run: Run) -> None:
    go(config, run)
    FakeStage.calls.clear()
    config.carve.ridge = 0.5
    outcome = run_stage(config, Run.open(run.path), "carve", progress=Progress(quiet=True))
    assert outcome.made
    assert FakeStage.calls == ["carve"]
    assert draft_of(run.recipe).checked().carve.ridge == 0.5
    assert states(run) == {
        "profile": "done", "carve": "done", "finetune": "stale", "calibrate": "stale", "export": "stale"
    }  # fmt: skip
    assert not run_stage(config, Run.open(run.path), "carve", progress=Progress(quiet=True)).made
    with pytest.raises(StaleArtifactError, match=r"inputs\.dynamic: carve:"):
        go(config, run)
    for name in USUAL[2:]:
        run_stage(config, Run.open(run.path), name, progress=Progress(quiet=True))
    assert go(config, run) == []


def test_one_stage_needs_its_inputs(config: RunConfig, run: Run) -> None:
    with pytest.raises(ArtifactError, match="carve needs what profile makes") as caught:
        run_stage(config, run, "carve", progress=Progress(quiet=True))
    assert "dynaconv profile" in str(caught.value)
    go(config, run, until="profile")
    config.profile.tokens *= 2
    with pytest.raises(StaleArtifactError, match=r"profile\.tokens: 32768 -> 65536"):
        run_stage(config, Run.open(run.path), "carve", progress=Progress(quiet=True))
    with pytest.raises(ConfigError, match="no such stage"):
        run_stage(config, Run.open(run.path), "resize", progress=Progress(quiet=True))


def test_one_stage_again_takes_what_came_of_it_along(config: RunConfig, run: Run) -> None:
    go(config, run)
    run_stage(config, Run.open(run.path), "finetune", redo=True, progress=Progress(quiet=True))
    assert states(run)["calibrate"] == "stale"
    assert go(config, run) == ["calibrate", "export"]


def test_status_of_a_run_whose_recipe_is_of_another_version(config: RunConfig, run: Run) -> None:
    go(config, run)
    before = status(Run.open(run.path))["stages"]
    run.recipe.write_text(run.recipe.read_text().replace("experts: nested", "experts: routed"), encoding="utf-8")
    found = status(Run.open(run.path))
    assert "say block_size" in found["problem"]
    assert found["stages"] == [{**row, "status": "stale"} for row in before]


def test_status_has_the_promised_shape(config: RunConfig, run: Run) -> None:
    assert status(run)["stages"] == []
    go(config, run, until="profile")
    rows = status(Run.open(run.path))["stages"]
    promised = {"name", "status", "fingerprint", "outputs", "metrics", "seconds", "peak_rss_bytes"}
    assert all(promised <= set(row) for row in rows)
    json.dumps(rows)
    assert rows[0]["outputs"][0]["path"].startswith("01-profile/")
    assert rows[1]["outputs"] == []


def test_a_resized_checkpoint_takes_the_source_s_place(config: RunConfig, run: Run) -> None:
    config.stages = ["resize", "profile", "carve"]
    assert go(config, run) == ["resize", "profile", "carve"]
    record = Run.open(run.path).manifest.record("profile")
    assert record is not None
    assert record.inputs["dense"]["id"].startswith("resize-")
    assert states(run) == {"resize": "done", "profile": "done", "carve": "done"}


def test_warnings_of_a_stage_reach_the_screen(
    config: RunConfig, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = FakeStage.steps

    def warn(self, context, state):
        context.log.warning("using %s", "the slow path")
        return steps(self, context, state)

    monkeypatch.setattr(FakeStage, "steps", warn)
    with Progress(plain=True) as progress:
        run_pipeline(config, run, until="profile", progress=progress)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "warning: using the slow path" in shown.err
    assert "1/5 profile  made 01-profile" in shown.err
    assert "using the slow path" in (run.logs / "profile.log").read_text()
