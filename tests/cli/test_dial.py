"""``dial-k``: the shape of its JSON, which point it takes, what it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from dynaconv.dynamic.layout import FFNLayout, Layout
from dynaconv.frontier import Frontier
from dynaconv.kernels.partition import Partition

POINT = {"budget", "active_share", "flops_per_token", "bytes_per_token", "loss", "quality", "agreement", "tokens_per_s"}
QUALITIES = {0.25: 0.7, 0.5: 0.9, 0.75: 0.97, 1.0: 0.995}


def row(budget: float, quality: float) -> dict[str, object]:
    cost = 1e6 * (1 + budget)
    return {
        "budget": budget,
        "active_share": budget + 0.001,
        "flops_per_token": cost,
        "bytes_per_token": cost,
        "loss": 2.5 - quality,
        "quality": quality,
        "agreement": 0.8,
        "tokens_per_s": None,
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder as far as ``dial-k`` looks at one: its layout with a measured frontier."""
    folder = tmp_path / "model"
    folder.mkdir()
    parent = {"loss": 1.5, "flops_per_token": 2e6, "bytes_per_token": 2e6, "tokens_per_s": None}
    frontier = {"parent": parent, "frontier": [row(*pair) for pair in QUALITIES.items()]}
    ffn = FFNLayout("model.layers.{layer}.mlp", "gate_proj", "up_proj", "down_proj", "hidden_act")
    Layout(Partition.equal(16, 8), layers=1, ffn=ffn, frontier=Frontier.from_json(frontier)).save(folder)
    return folder


def chosen(dynaconv: Callable, *arguments: object) -> dict[str, object]:
    ran = dynaconv("dial-k", *arguments, "--json")
    assert (ran.code, ran.err) == (0, "")
    return json.loads(ran.out)["operating_point"]


def test_a_real_run_has_the_promised_shape(dynaconv: Callable, converted: Path) -> None:
    ran = dynaconv("dial-k", converted, "--budget", 0.5, "--json")
    content = json.loads(ran.out)
    assert set(content) == {"parent", "frontier", "operating_point"}
    assert [point["budget"] for point in content["frontier"]] == [0.25, 0.5, 1.0]
    assert all(set(point) >= POINT for point in [*content["frontier"], content["operating_point"]])
    assert content["parent"]["loss"] > 0
    assert content["operating_point"]["budget"] == 0.5
    exported = json.loads(dynaconv("dial-k", converted / "05-export", "--budget", 0.5, "--json").out)
    assert exported == content, "a run and the model in it tell the same"


def test_a_budget(dynaconv: Callable, model: Path) -> None:
    exact = chosen(dynaconv, model, "--budget", 0.5)
    assert (exact["budget"], exact["dial"], exact["between"]) == (0.5, 0.5, None)
    between = chosen(dynaconv, model, "--budget", 0.6)
    assert (between["budget"], between["dial"], between["between"]) == (0.6, 0.6, [0.5, 0.75])
    assert between["quality"] == pytest.approx(0.9 + 0.4 * 0.07)
    assert set(between) >= POINT and between["loss"] is None, "what was not measured is not made up"
    told = dynaconv("dial-k", model, "--budget", 0.6).out
    assert "between two measured ones: 0.5 (quality 0.9000) and 0.75 (quality 0.9700)" in told


def test_a_quality(dynaconv: Callable, model: Path) -> None:
    assert chosen(dynaconv, model, "--quality", 0.9)["budget"] == 0.5
    between = chosen(dynaconv, model, "--quality", 0.935)
    assert (between["budget"], between["between"]) == (pytest.approx(0.625), [0.5, 0.75])
    assert between["quality"] == pytest.approx(0.935)


def test_a_quality_above_the_parents(dynaconv: Callable, model: Path) -> None:
    layout = Layout.load(model)
    assert layout.frontier is not None
    points = tuple(replace(point, quality=point.quality + 0.1) for point in layout.frontier.points)
    replace(layout, frontier=replace(layout.frontier, points=points)).save(model)
    assert chosen(dynaconv, model, "--quality", 1.07)["budget"] == 0.75


def test_a_quality_means_the_same_budget_to_the_command_and_to_the_model(dynaconv: Callable, converted: Path) -> None:
    import dynaconv as package

    loaded = package.load(converted / "05-export")
    qualities = [point.quality for point in loaded.layout.frontier.points]
    for quality in [*qualities, *(sum(pair) / 2 for pair in pairwise(qualities)), min(qualities) / 2]:
        budget = chosen(dynaconv, converted, "--quality", repr(quality))["dial"]
        asked = package.Dial(quality=quality)
        assert asked.resolved(loaded.layout) == budget
        assert asked.thresholds(loaded.layout) == package.Dial(budget=budget).thresholds(loaded.layout)


def test_neither_shows_where_the_model_stands(dynaconv: Callable, model: Path) -> None:
    assert chosen(dynaconv, model)["budget"] == 1.0, "the full dial, before a point was chosen"
    assert dynaconv("dial-k", model, "--budget", 0.6, "--write").code == 0
    now = chosen(dynaconv, model)
    assert (now["dial"], now["between"]) == (0.6, [0.5, 0.75])


def test_the_table_marks_the_point_beside_the_parent(dynaconv: Callable, model: Path) -> None:
    lines = dynaconv("dial-k", model, "--budget", 0.5).out.splitlines()
    (marked,) = [line.split() for line in lines if "→" in line]
    assert marked[:2] == ["→", "0.5"]
    (parent,) = [line.split() for line in lines if "parent" in line]
    assert parent == ["parent", "1.000", "2M", "2.0", "MB", "1.5000", "1.0000", "1.000", "-"]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_table_is_whole_on_a_terminal(on_terminal: Callable, model: Path, width: int) -> None:
    lines = on_terminal(width, "dial-k", model, "--budget", 0.5)
    assert max(map(len, lines)) <= width
    (marked,) = [line.split() for line in lines if "→" in line]
    assert marked == ["→", "0.5", "0.501", "1.5M", "1.5", "MB", "1.6000", "0.9000", "0.800", "-"]
    (parent,) = [line.split() for line in lines if "parent" in line]
    assert parent == ["parent", "1.000", "2M", "2.0", "MB", "1.5000", "1.0000", "1.000", "-"]
    assert not any("Left out" in line for line in lines)


def test_what_a_narrow_terminal_leaves_out_is_named(on_terminal: Callable, model: Path) -> None:
    lines = on_terminal(60, "dial-k", model, "--budget", 0.5)
    (marked,) = [line.split() for line in lines if "→" in line]
    assert marked == ["→", "0.5", "0.501", "1.5M", "1.6000", "0.9000", "-"]
    assert "Left out at 60 columns: bytes/token, agreement. A wider terminal or --json shows them." in lines


def test_a_written_point_is_what_the_model_uses(dynaconv: Callable, converted: Path, tmp_path: Path) -> None:
    import dynaconv as package

    run = tmp_path / "run"
    shutil.copytree(converted, run)
    ran = dynaconv("dial-k", run, "--budget", 0.25, "--write")
    assert "Written to" in ran.out
    assert json.loads((run / "05-export" / "dial.json").read_text())["budget"] == 0.25
    assert package.load(run / "05-export").dial == package.Dial(budget=0.25)
    states = json.loads(dynaconv("convert", run, "--json").out)["stages"]
    assert {stage["status"] for stage in states} == {"done"}, "a choice is no damage"


def test_the_picture_is_named(dynaconv: Callable, converted: Path) -> None:
    assert str(converted / "04-calibrate" / "frontier.png") in dynaconv("dial-k", converted).out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--budget", "0"], 2, "outside (0, 1]"),
        (["--budget", "1.5"], 2, "outside (0, 1]"),
        (["--budget", "nan"], 2, "outside (0, 1]"),
        (["--quality", "-1"], 2, "not above 0"),
        (["--budget", "0.5", "--quality", "0.9"], 2, "both given"),
        (["--write"], 2, "--budget S or --quality Q"),
        (["--budget", "0.1"], 4, "nearest is 0.25"),
        (["--quality", "0.999"], 4, "nearest is 0.9950, at budget 1"),
    ],
)
def test_what_cannot_be_asked_for(dynaconv: Callable, model: Path, arguments: list[str], code: int, said: str) -> None:
    ran = dynaconv("dial-k", model, *arguments, "--json")
    assert (ran.code, ran.out) == (code, "")
    assert said in ran.err


def test_what_is_no_model(dynaconv: Callable, tmp_path: Path, model: Path) -> None:
    for path, said in ((tmp_path / "absent", "no such folder"), (tmp_path, "neither a run nor a dynamic model")):
        ran = dynaconv("dial-k", path)
        assert ran.code == 3
        assert said in ran.err
    replace(Layout.load(model), frontier=None).save(model)
    ran = dynaconv("dial-k", model)
    assert ran.code == 3
    assert "not calibrated" in ran.err
    (model / "dynaconv.json").write_text('{"schema": 99}')
    ran = dynaconv("dial-k", model)
    assert ran.code == 3
    assert "upgrade dynaconv" in ran.err


@pytest.mark.parametrize(("content", "said"), [(None, "missing"), ("{", "not valid JSON"), ("{}", "cannot be read")])
def test_a_damaged_frontier(
    dynaconv: Callable, converted: Path, tmp_path: Path, content: str | None, said: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(converted, run)
    frontier = run / "04-calibrate" / "frontier.json"
    frontier.unlink()
    if content is not None:
        frontier.write_text(content)
    ran = dynaconv("dial-k", run)
    assert (ran.code, ran.out) == (3, "")
    assert said in ran.err and str(frontier) in ran.err


def test_a_damaged_stored_point(dynaconv: Callable, model: Path) -> None:
    (model / "dial.json").write_text("{}")
    ran = dynaconv("dial-k", model)
    assert ran.code == 3
    assert "dial.json" in ran.err
    assert dynaconv("dial-k", model, "--budget", 0.5, "--write").code == 0
    assert dynaconv("dial-k", model).code == 0
