"""Orders of stages that cannot work are explained: who lacks what, and who makes it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from fake_stages import FAKES, USUAL, FakeStage

from dynaconv.errors import ConfigError
from dynaconv.pipeline import registry
from dynaconv.pipeline.lineage import order_problems
from dynaconv.pipeline.stage import KINDS


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "STAGES", FAKES)


def problems(*names: str) -> list[str]:
    return order_problems([registry.load(name) for name in names])


@pytest.mark.parametrize(
    "names",
    [
        USUAL,
        ["profile"],
        ["profile", "carve"],
        ["profile", "carve", "calibrate", "export"],
        ["resize", "profile", "carve"],
        ["profile", "resize"],
        ["resize", *USUAL],
    ],
)
def test_legal(names: list[str]) -> None:
    assert problems(*names) == []


def test_missing_entirely() -> None:
    assert problems("carve") == ["carve needs statistics, which profile makes: add it to the stages"]


def test_made_too_late() -> None:
    assert problems("carve", "profile") == ["carve needs statistics, which profile makes: put profile before carve"]


def test_several_makers_are_all_named() -> None:
    assert problems("profile", "calibrate") == [
        "calibrate needs dynamic, which carve or finetune makes: add it to the stages"
    ]


def test_out_of_date() -> None:
    (found,) = problems("profile", "resize", "carve")
    assert found == "carve needs statistics, but resize makes what profile made out of date; put profile after resize"
    (found,) = problems("profile", "carve", "calibrate", "finetune", "export")
    assert (
        found == "export needs dials, but finetune makes what calibrate made out of date; put calibrate after finetune"
    )


def test_every_mistake_is_found() -> None:
    assert len(problems("export", "carve")) == 3


def test_unknown_stage_has_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'carve'"):
        registry.load("crave")
    assert registry.load_all(["profile", "crave"])[1] == [registry.unknown("crave")]


def test_names_cost_no_import() -> None:
    code = (
        "import sys; from dynaconv.pipeline import registry; assert 'carve' in registry.names();"
        "assert not {'torch', 'transformers', 'dynaconv.convert.stage'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_kinds_are_known() -> None:
    for name in FAKES:
        stage = registry.load(name)
        assert isinstance(stage, FakeStage)
        assert {*stage.consumes, stage.produces, *stage.invalidates} <= set(KINDS)
