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

OLD = {"budget", "active_share", "flops_per_token", "bytes_per_token", "loss", "quality", "agreement", "tokens_per_s"}
POINT = OLD | {"bytes_share", "flops_share", "exact_share", "prompted_loss", "prompted_quality"}
QUALITIES = {0.25: 0.7, 0.5: 0.9, 0.75: 0.97, 1.0: 0.995}


def row(budget: float, quality: float) -> dict[str, object]:
    cost = 1e6 * (1 + budget)
    return {
        "budget": budget,
        "bytes_share": budget + 0.001,
        "flops_share": 0.1 + 0.9 * budget,
        "active_share": budget**2,
        "exact_share": budget**3,
        "flops_per_token": cost,
        "bytes_per_token": cost,
        "loss": 2.5 - quality,
        "quality": quality,
        "agreement": 0.8,
        "prompted_loss": 2.4 - quality,
        "prompted_quality": quality + 0.003,
        "tokens_per_s": None,
    }


PARENT = {"loss": 1.5, "prompted_loss": 1.4, "flops_per_token": 2e6, "bytes_per_token": 2e6, "tokens_per_s": None}


def saved(folder: Path, frontier: dict[str, object]) -> Path:
    """A model folder as far as ``dial-k`` looks at one: its layout with a measured frontier."""
    folder.mkdir()
    ffn = FFNLayout("model.layers.{layer}.mlp", "gate_proj", "up_proj", "down_proj", "hidden_act")
    Layout(Partition.equal(16, 8), layers=1, ffn=ffn, frontier=Frontier.from_json(frontier)).save(folder)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    rows = [row(*pair) for pair in QUALITIES.items()]
    return saved(tmp_path / "model", {"unit": "bytes", "router_bytes_share": 0.1, "parent": PARENT, "frontier": rows})


@pytest.fixture
def old_model(tmp_path: Path) -> Path:
    """As versions wrote it that counted neurons only."""
    rows = [{name: value for name, value in row(*pair).items() if name in OLD} for pair in QUALITIES.items()]
    return saved(tmp_path / "old", {"parent": PARENT, "frontier": rows})


def chosen(dynaconv: Callable, *arguments: object) -> dict[str, object]:
    ran = dynaconv("dial-k", *arguments, "--json")
    assert (ran.code, ran.err) == (0, "")
    return json.loads(ran.out)["operating_point"]


def test_a_real_run_has_the_promised_shape(dynaconv: Callable, converted: Path) -> None:
    ran = dynaconv("dial-k", converted, "--budget", 0.5, "--json")
    content = json.loads(ran.out)
    assert set(content) == {"unit", "router_bytes_share", "parent", "frontier", "operating_point"}
    assert content["unit"] == "bytes"
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
    assert between["flops_share"] == pytest.approx(0.64)
    told = dynaconv("dial-k", model, "--budget", 0.6).out
    assert "between two measured ones: 0.5 (quality 0.9000) and 0.75 (quality 0.9700)" in told
    assert "reads 60.1% of the parent's FFN bytes and computes 64.0% of its FFN FLOPs, routers included" in told
    assert chosen(dynaconv, model, "--bytes", 0.6) == between


def test_a_point_is_told_in_words(dynaconv: Callable, model: Path) -> None:
    *_, told = dynaconv("dial-k", model, "--bytes", 0.5).out.splitlines()
    assert told == (
        "Operating point: budget 0.5, quality 0.9000 (0.9030 after a prompt read at the full dial). On average a token "
        "reads 50.1% of the parent's FFN bytes and computes 55.0% of its FFN FLOPs, routers included; 25.0% of the "
        "neurons are active, 12.5% with exact values."
    )


def test_flops(dynaconv: Callable, model: Path) -> None:
    assert chosen(dynaconv, model, "--flops", 0.55)["budget"] == 0.5
    between = chosen(dynaconv, model, "--flops", 0.6625)
    assert (between["budget"], between["between"]) == (pytest.approx(0.625), [0.5, 0.75])
    assert between["flops_share"] == pytest.approx(0.6625)
    assert chosen(dynaconv, model, "--flops", 1)["budget"] == 1.0


def test_a_frontier_of_an_earlier_version_shows_its_unit(dynaconv: Callable, old_model: Path) -> None:
    told = dynaconv("dial-k", old_model, "--budget", 0.5).out
    assert "a budget is the share of the FFN's neurons that are active, routers not counted." in told
    assert "On average 25.0% of the neurons are active." in told
    assert "FFN bytes" not in told and "FFN FLOPs" not in told and "exact" not in told and "prompt" not in told
    assert json.loads(dynaconv("dial-k", old_model, "--budget", 0.5, "--json").out)["unit"] == "neurons"


def test_what_no_point_has_is_not_shown(dynaconv: Callable, model: Path) -> None:
    layout = Layout.load(model)
    assert layout.frontier is not None
    points = tuple(
        replace(point, exact_share=point.active_share, prompted_quality=None) for point in layout.frontier.points
    )
    replace(layout, frontier=replace(layout.frontier, points=points)).save(model)
    told = dynaconv("dial-k", model, "--bytes", 0.5).out
    assert "exact" not in told and "prompt" not in told
    assert "25.0% of the neurons are active." in told


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
    (parent,) = [line.split() for line in lines if line.split()[:1] == ["parent"]]
    shares, figures = ["1.000"] * 4, ["1.5000", "1.0000", "1.0000", "1.000"]
    assert parent == ["parent", *shares, *figures, "2M", "2.0", "MB", "-"]


LEFT_OUT = {
    130: "",
    100: "FLOPs/token, bytes/token",
    80: "loss, agreement, FLOPs/token, bytes/token",
    60: "exact neurons, loss, prompted quality, agreement, FLOPs/token, bytes/token",
}


@pytest.mark.parametrize("width", LEFT_OUT)
def test_the_table_fits_a_terminal_and_names_what_it_leaves_out(on_terminal: Callable, model: Path, width: int) -> None:
    lines = on_terminal(width, "dial-k", model, "--bytes", 0.5)
    table = lines[: next(number for number, line in enumerate(lines) if line.startswith("Operating point"))]
    assert max(len(line) for line in table if "Left out" not in line) <= width
    cells = {
        "budget": "0.5",
        "FFN bytes": "0.501",
        "FFN FLOPs": "0.550",
        "neurons": "0.250",
        "exact neurons": "0.125",
        "loss": "1.6000",
        "quality": "0.9000",
        "prompted quality": "0.9030",
        "agreement": "0.800",
        "FLOPs/token": "1.5M",
        "bytes/token": "1.5 MB",
        "tokens/s": "-",
    }
    left_out = LEFT_OUT[width].split(", ")
    (marked,) = [line.split() for line in lines if "→" in line]
    assert marked == ["→", *" ".join(cell for name, cell in cells.items() if name not in left_out).split()]
    named = [line for line in lines if "Left out" in line]
    assert bool(named) == bool(LEFT_OUT[width])
    assert all(line.startswith(f"Left out at {width} columns: {LEFT_OUT[width]}. ") for line in named)


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
        (["--bytes", "0"], 2, "outside (0, 1]"),
        (["--flops", "0"], 2, "FLOPs share 0 is outside (0, 1]"),
        (["--flops", "nan"], 2, "outside (0, 1]"),
        (["--budget", "0.5", "--quality", "0.9"], 2, "both given"),
        (["--bytes", "0.5", "--flops", "0.5"], 2, "--bytes and --flops are both given"),
        (["--bytes", "0.5", "--flops", "0.5", "--quality", "0.9"], 2, "all given"),
        (["--write"], 2, "--bytes S, --flops S or --quality Q"),
        (["--budget", "0.1"], 4, "nearest is 0.25"),
        (["--bytes", "0.1"], 4, "0.25 or more: the routers alone, 0.1 of the parent's FFN bytes"),
        (["--flops", "0.1"], 4, "the lowest is 0.3250, at budget 0.25"),
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
