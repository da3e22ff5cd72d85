"""What the arguments of convert and plan mean: source, run folder, overrides, going on with a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from dynaconv.artifacts.run import RECIPE_FILE
from dynaconv.cli.request import Request, request, request_of
from dynaconv.config import RunConfig
from dynaconv.errors import ArtifactError, ConfigError
from dynaconv.recipes import compose


def begun(folder: Path, **changes: object) -> Path:
    """A run folder that knows its recipe."""
    folder.mkdir(parents=True)
    config = compose("smoke")
    for name, value in changes.items():
        setattr(config, name, value)
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(asdict(config)))
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def shown(asked: Request) -> tuple[str, str, int | None]:
    return asked.config.source, asked.run.as_posix(), asked.config.block_size


def test_nothing_given_means_the_embedded_default() -> None:
    assert shown(request(None)) == ("", "runs/embedded-default", None)


def test_a_run_is_named_after_its_source_and_recipe(tmp_path: Path) -> None:
    (tmp_path / "my model").mkdir()
    assert shown(request("my model", recipe="smoke")) == (str(tmp_path / "my model"), "runs/my-model-smoke", None)
    assert shown(request("org/some-model")) == ("org/some-model", "runs/some-model-default", None)
    assert shown(request(".", out=Path("x"))) == (str(tmp_path), "x", None)


def test_an_override_may_come_first() -> None:
    assert shown(request("block_size=4")) == ("", "runs/embedded-default", 4)
    assert shown(request("block_size=4", ["seed=1"])).count(4) == 1
    assert shown(request(None, ["source=org/model"])) == ("org/model", "runs/model-default", None)


def test_a_folder_with_an_equals_sign_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    assert request("a=b").config.source == str(tmp_path / "a=b")


def test_two_sources_are_one_too_many() -> None:
    assert "two sources" in request("org/a", ["source=org/b"]).draft.mistakes[0]


def test_a_run_goes_on_with_its_own_recipe(tmp_path: Path) -> None:
    run = begun(tmp_path / "runs" / "mine", block_size=4, source="org/model")
    for asked in (request(str(run)), request(None, out=run), request(str(run), out=run), request_of(run)):
        assert shown(asked) == ("org/model", str(run), 4)
    assert shown(request(str(run), ["block_size=16"])) == ("org/model", str(run), 16)
    assert request(str(run)).config.finetune == compose("smoke").finetune


def test_a_run_may_go_on_with_another_recipe(tmp_path: Path) -> None:
    run = begun(tmp_path / "mine", block_size=4, source="org/model")
    asked = request(None, recipe="nested-uniform", out=run)
    assert (shown(asked), asked.config.blocks) == (("org/model", str(run), None), 8)
    assert asked.config.finetune.router == "uniform"


def test_a_run_stays_where_it_is(tmp_path: Path) -> None:
    run = begun(tmp_path / "mine")
    with pytest.raises(ConfigError, match="cannot go on in another folder"):
        request(str(run), out=tmp_path / "other")


def test_a_stage_needs_a_run_or_a_source(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not the folder of a run"):
        request_of(tmp_path / "absent")
    assert request_of(tmp_path / "absent", ["source=org/model"]).config.source == "org/model"


def test_mistakes_of_every_kind_come_together() -> None:
    asked = request("org/model", ["block=3", "block_size=0", "stages=carve,profile,polish", "seed=x"])
    told = "\n".join(asked.problems(until="calibrate", redo="nope"))
    for part in ("'block'", "block_size is 0", "seed is 'x'", "'polish'", "--until calibrate", "--redo nope"):
        assert part in told
    with pytest.raises(ConfigError, match="mistakes in the configuration"):
        asked.check(until="calibrate")
    assert isinstance(asked.config, RunConfig)


def test_each_mistake_is_told_once() -> None:
    few = ["finetune.tokens=10", "calibrate.tokens=10", "calibrate.score_tokens=10", "profile.tokens=10"]
    assert len(request("org/model", few, recipe="tune").problems()) == len(few)
