"""``dynaconv.json``: round trips, files of schemas 1 and 2, and damaged files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_models import ROUTERS, a_frontier, layout_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dynaconv.dynamic.dial import Dial
from dynaconv.dynamic.layout import LAYOUT_FILE, CopyLayout, DialTable, FFNLayout, Layout, RouterLayout
from dynaconv.dynamic.modeling import attach
from dynaconv.dynamic.routers.kinds import KINDS
from dynaconv.kernels.partition import Partition

FFN = FFNLayout("model.layers.{layer}.mlp", "gate_proj", "up_proj", "down_proj", "hidden_act")
EDGES = (0, 3, 7, 8, 16, 20)
BUDGETS = (0.25, 0.5, 1.0)
OLD_KINDS = {"gate": "width", "curve": "curve", "class": "class", "blocks": "linear", "none": "none"}
OLD_LEVELS = {
    "gate": ((0.5, -1.25), (2.0, 1.1), (8.5, 8.5)),
    "curve": ((-1.0, -2.7), (0.5, 0.3), (40.0, 40.0)),
    "class": ((0.3, 0.123), (0.6, 0.77), (1.000001, 1.0)),
    "blocks": ((-0.7, -0.31), (0.0, 0.2), (3.5, 3.5)),
    "none": ((1.0, 2.0), (2.0, 3.0), (5.0, 5.0)),
}


def old_file(kind: str, edges: tuple[int, ...] = EDGES) -> dict[str, Any]:
    """What the code of schema 1 wrote."""
    return {
        "schema": 1,
        "edges": list(edges),
        "layers": 2,
        "ffn": {"path": FFN.path, "gate": FFN.gate, "up": FFN.up, "down": FFN.down, "activation": FFN.activation},
        "router": {"kind": kind, "linear": True, "rank": 8, "bound": 3.0},
        "dial": {
            "budgets": list(BUDGETS),
            "levels": [list(row) for row in OLD_LEVELS[kind]],
            "qualities": [0.8, 0.9, 1.0],
        },
        "lineage": {"source": "here"},
        "frontier": a_frontier(BUDGETS, (0.8, 0.9, 1.0)).to_json(),
    }


def old_choice(kind: str, scores: Tensor, level: float, edges: tuple[int, ...]) -> Tensor:
    """What the code of schema 1 chose: widths, and for ``blocks`` which blocks."""
    blocks, wanted = len(edges) - 1, torch.as_tensor(level, dtype=scores.dtype)
    if kind == "blocks":
        return scores + wanted[..., None] > 0
    if kind in ("gate", "none"):
        return (scores + wanted - 0.5).ceil().clamp(0, blocks).long()
    if kind == "curve":
        share = torch.tensor(edges, dtype=scores.dtype) / edges[-1]
        error = functional.pad(scores.exp(), (0, 1))
        return (error + torch.exp(-wanted)[..., None] * share).argmin(-1)
    reached = scores.softmax(-1).cumsum(-1)[..., :-1] >= wanted[..., None]
    return blocks - reached.sum(-1)


def write(folder: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / LAYOUT_FILE).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", OLD_KINDS)
@pytest.mark.parametrize("edges", [EDGES, (0, 4, 8, 12), tuple(range(0, 513, 8))], ids=["uneven", "equal", "64"])
def test_a_file_of_schema_1_chooses_the_same_blocks(kind: str, edges: tuple[int, ...], tmp_path: Path) -> None:
    layout = Layout.load(write(tmp_path, old_file(kind, edges)))
    assert layout.router == RouterLayout(OLD_KINDS[kind], linear=True, rank=8, bound=3.0)
    assert (layout.partition.edges, layout.layers, layout.ffn) == (edges, 2, FFN)
    assert layout.lineage == {"source": "here"}
    assert layout.frontier == a_frontier(BUDGETS, (0.8, 0.9, 1.0))
    made = KINDS[layout.router.kind](6, layout.partition, layout.router)
    generator = torch.Generator().manual_seed(0)
    shape = (5000,) if made.features == 0 else (5000, len(edges) - 1)
    scores = 2 * torch.randn(shape, generator=generator) if kind != "none" else torch.zeros(shape)
    for budget, levels in zip(BUDGETS[:-1], OLD_LEVELS[kind], strict=False):
        for threshold, level in zip(Dial(budget).thresholds(layout), levels, strict=True):
            found, expected = made.choose(scores, threshold), old_choice(kind, scores, level, edges)
            if kind != "blocks":
                assert torch.equal(found.width(), expected)
            else:
                assert torch.equal(found.mask(layout.blocks), expected)
    between = zip(Dial(0.375).thresholds(layout), *OLD_LEVELS[kind][:2], strict=True)
    for threshold, low, high in between:  # interpolated, as levels were
        expected = old_choice(kind, scores, (low + high) / 2, edges)
        found = made.choose(scores, threshold)
        same = found.width() == (expected.sum(-1) if kind == "blocks" else expected)
        assert float(same.double().mean()) > 0.999
    assert Dial.full().thresholds(layout) == (-math.inf, -math.inf)


def test_a_file_of_schema_1_without_a_dial(tmp_path: Path) -> None:
    layout = Layout.load(write(tmp_path, {**old_file("gate"), "dial": None, "frontier": {}}))
    assert layout.dial is None
    assert layout.frontier is None


def test_a_file_of_an_old_schema_is_saved_as_the_newest(tmp_path: Path) -> None:
    for old in (old_file("blocks"), file_of_schema_2()):
        layout = Layout.load(write(tmp_path, old))
        layout.save(tmp_path)
        assert json.loads((tmp_path / LAYOUT_FILE).read_text())["schema"] == 3
        assert Layout.load(tmp_path) == layout


def test_a_file_of_schema_2_has_budgets_of_neurons_and_exact_values(tmp_path: Path) -> None:
    layout = Layout.load(write(tmp_path, file_of_schema_2()))
    assert layout.dial == DialTable(BUDGETS, ((2.0, 2.0), (1.0, 1.0), (0.0, 0.0)), unit="neurons")
    assert (layout.copy, layout.means, layout.router) == (None, (), RouterLayout("width", True, 8, 3.0))
    assert Dial(0.375).thresholds(layout) == (1.5, 1.5)
    assert Dial(0.375).exact(layout) == Dial(0.375).means(layout) == ()
    assert Layout.load(write(tmp_path, {**file_of_schema_2(), "dial": None})).dial is None


@settings(max_examples=25, deadline=None)
@given(
    partition=st.sampled_from([Partition.at(EDGES), Partition.equal(77, 16), Partition.equal(7, 1)]),
    kind=st.sampled_from(sorted(KINDS)),
    gate=st.none() | st.just("gate_proj"),
    rows=st.lists(st.tuples(st.floats(allow_nan=False), st.floats(-9, 9)), min_size=3, max_size=3),
    calibrated=st.booleans(),
    exact=st.booleans(),
    copy=st.builds(CopyLayout, bits=st.integers(3, 8), group=st.integers(1, 64), values=st.booleans()),
    means=st.sampled_from([(), (0.25,), (0.1, 0.7)]),
)
def test_what_was_saved_is_loaded(
    partition: Partition,
    kind: str,
    gate: str | None,
    rows: list[Any],
    calibrated: bool,
    exact: bool,
    copy: CopyLayout,
    means: tuple[float, ...],
    tmp_path_factory: Any,
) -> None:
    folder = tmp_path_factory.mktemp("layout")
    partition = Partition.equal(partition.neurons, 1) if kind == "sketch" else partition
    ffn = FFNLayout("a.{layer}", gate, "u", "d", "act")
    layout = Layout(partition, 2, ffn, ROUTERS[kind], copy, means, itemsize=2, lineage={"a": [1]})
    if calibrated:
        table = DialTable(BUDGETS, tuple(rows), tuple(rows) if exact else (), "bytes" if exact else "neurons")
        layout = layout.with_dial(table, a_frontier(BUDGETS, (0.8, 0.9, 1.0)))
    layout.save(folder)
    assert Layout.load(folder) == layout


def file_of_schema_2() -> dict[str, Any]:
    """What the code of schema 2 wrote."""
    return {
        "schema": 2,
        "partition": {"edges": list(EDGES)},
        "layers": 2,
        "ffn": old_file("gate")["ffn"],
        "router": {"kind": "width", "linear": True, "rank": 8, "bound": 3.0},
        "dial": {"budgets": list(BUDGETS), "thresholds": [[2, 2], [1, 1], [0, 0]]},
        "lineage": {},
        "frontier": None,
    }


def new_file() -> dict[str, Any]:
    new = {
        "schema": 3,
        "partition": {"neurons": 20, "block_size": 1},
        "copy": {"bits": 4, "group": 32, "values": True},
        "means": [0.25, 0.5],
        "itemsize": 2,
    }
    dial = {**file_of_schema_2()["dial"], "exact": [[3, 3], [2, 2], [0, 0]], "unit": "bytes"}
    router = {"kind": "sketch", "bits": 3, "coarse": 2, "reach": 0.7}
    return {**file_of_schema_2(), **new, "router": router, "dial": dial}


def with_part(name: str, **changed: Any) -> dict[str, Any]:
    """The sound file with fields of its part ``name`` changed."""
    return {**new_file(), name: {**new_file()[name], **changed}}


def test_the_file_that_damage_is_done_to_is_sound(tmp_path: Path) -> None:
    layout = Layout.load(write(tmp_path, new_file()))
    assert (layout.blocks, layout.copy, layout.means, layout.itemsize) == (20, CopyLayout(4, 32, True), (0.25, 0.5), 2)
    assert layout.dial is not None and layout.dial.exact == ((3.0, 3.0), (2.0, 2.0), (0.0, 0.0))


DAMAGE: dict[str, Any] = {
    "no JSON": "{",
    "empty": "",
    "a list": [1],
    "a number": 3,
    **{f"no {name}": {k: v for k, v in new_file().items() if k != name} for name in new_file() if name != "schema"},
    **{f"{name} is a number": {**new_file(), name: 3.5} for name in new_file() if name not in ("schema", "lineage")},
    **{f"{name} is text": {**new_file(), name: "x"} for name in new_file() if name not in ("schema", "lineage")},
    **{
        f"dial without {name}": {**new_file(), "dial": {k: v for k, v in new_file()["dial"].items() if k != name}}
        for name in new_file()["dial"]
    },
    **{
        f"schema 2, no {name}": {k: v for k, v in file_of_schema_2().items() if k != name}
        for name in file_of_schema_2()
        if name != "schema"
    },
    "a part of the FFN missing": {**new_file(), "ffn": {"path": "x"}},
    "an unknown part of the router": {**new_file(), "router": {"kind": "width", "colour": 1}},
    "edges fall": {**new_file(), "partition": {"edges": [0, 5, 3]}},
    "budgets fall": with_part("dial", budgets=[1.0, 0.5], thresholds=[[1, 1], [2, 2]], exact=[]),
    "a budget above 1": with_part("dial", budgets=[0.5, 1.5], thresholds=[[1, 1], [2, 2]], exact=[]),
    "no budgets": with_part("dial", budgets=[], thresholds=[], exact=[]),
    "a row of thresholds missing": with_part("dial", thresholds=[[1, 1]]),
    "no thresholds": with_part("dial", thresholds=[]),
    "a row of exact thresholds missing": with_part("dial", exact=[[1, 1]]),
    "a layer without threshold": with_part("dial", budgets=[1.0], thresholds=[[1]], exact=[]),
    "a layer without exact threshold": with_part("dial", exact=[[1], [1], [1]]),
    "thresholds are text": with_part("dial", budgets=[1.0], thresholds=[["a", "b"]], exact=[]),
    "a copy of no bits": with_part("copy", bits=0),
    "a copy of nine bits": with_part("copy", bits=9),
    "a copy in groups of none": with_part("copy", group=0),
    "an unknown part of the copy": with_part("copy", colour=1),
    "a sketch without a copy": {**new_file(), "copy": None},
    "a sketch of more bits than the copy": with_part("router", bits=5),
    "a sketch of no bits": with_part("router", bits=0, coarse=0),
    "a sketch that reads more at first than at last": with_part("router", coarse=4),
    "a sketch of blocks": {**new_file(), "partition": {"edges": list(EDGES)}},
    "means fall": {**new_file(), "means": [0.5, 0.25]},
    "budgets of something else": with_part("dial", unit="kilograms"),
    "means are words": {**new_file(), "means": ["a"]},
    **{f"schema 1, no {k}": {a: b for a, b in old_file("gate").items() if a != k} for k in ("edges", "router", "dial")},
    "schema 1, no levels": {**old_file("gate"), "dial": {"budgets": [1.0]}},
    "schema 1, no kind": {**old_file("gate"), "router": {}},
    "schema 1, levels are text": {**old_file("gate"), "dial": {"budgets": [1.0], "levels": [["a", "b"]]}},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_says_what_to_do(damage: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{LAYOUT_FILE} is damaged \(.+\): export the model again"):
        Layout.load(write(tmp_path, DAMAGE[damage]))


@pytest.mark.parametrize(
    ("schema", "way_out"), [(4, "upgrade dynaconv"), (0, "export"), (None, "export"), ("2", "export")]
)
def test_an_unknown_schema_says_what_to_do(schema: Any, way_out: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"has schema {schema!r}; this dynaconv reads 1 to 3: {way_out}"):
        Layout.load(write(tmp_path, {**new_file(), "schema": schema}))


def test_a_folder_without_the_file_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Layout.load(tmp_path)


def test_an_unknown_router_kind_says_what_to_do(tiny_checkpoint: Any) -> None:
    from dataclasses import replace

    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint()
    layout = replace(layout_of(folder), router=RouterLayout("oracle"))
    with pytest.raises(ValueError, match=r"router kind 'oracle'; this dynaconv knows none, .*: upgrade dynaconv"):
        attach(AutoModelForCausalLM.from_pretrained(folder), layout)
