"""Rows of the resizing benchmark are trained once, start from real clones, and are compared as the script says."""

from __future__ import annotations

import json
import runpy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dynaconv.data.windows import Windows, evaluation_batches
from dynaconv.train.pretrain import Schedule
from dynaconv.train.shape import Shape, build

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
LARGE = Shape(hidden=32, ffn=64, layers=2, heads=4, kv_heads=2, vocabulary=300, positions=32)
SMALL = replace(LARGE, hidden=16, ffn=32, heads=2, kv_heads=1)
TOKENS = 4 * 8 * 5  # five steps


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    variants = runpy.run_path(str(SCRIPTS / "resize_clones.py"))["VARIANTS"]
    return {**runpy.run_path(str(SCRIPTS / "bench_resize.py")), "VARIANTS": variants}


@pytest.fixture
def bench(scripts: dict[str, Any], tmp_path: Path) -> Any:
    tokens = torch.randint(300, (640,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    windows = Windows(tokens, 8)
    schedule = Schedule(batch_size=4, warmup_share=0.03, decay_share=1.0)
    return scripts["Bench"](tmp_path, windows, list(evaluation_batches(windows, 4, 64)), schedule)


def saved(shape: Shape, folder: Path) -> Path:
    build(shape, 0).save_pretrained(folder)
    return folder


def refuse(row: Any) -> Any:
    raise AssertionError(f"{row.name} is trained")


def test_a_finished_row_is_found_and_a_change_of_settings_trains_it_again(scripts: dict[str, Any], bench: Any) -> None:
    row = scripts["Row"]("random", "", 1e-2, 0, TOKENS)
    first = bench.run(row, lambda row: build(SMALL, row.seed))
    assert [tokens for tokens, _ in first["curve"]] == [0, 32, 64, 96, 128, 160]
    assert first["curve"][-1][1] != first["curve"][0][1]
    assert bench.run(row, refuse)["curve"] == first["curve"] and len(bench.rows) == 1
    with pytest.raises(AssertionError, match=r"random-AdamW-0\.01-1"):
        bench.run(replace(row, seed=1), refuse)
    with pytest.raises(AssertionError, match="is trained"):
        replace(bench, schedule=replace(bench.schedule, clip=0.5)).run(row, refuse)
    assert bench.run(replace(row, seed=1), lambda row: build(SMALL, row.seed))["curve"] != first["curve"]


def test_the_grid_grows_until_the_best_rate_is_inside(
    scripts: dict[str, Any], bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Any, row: Any, *_: Any) -> dict[str, Any]:
        return {"learning_rate": row.learning_rate, "seed": row.seed, "curve": [[0, abs(row.learning_rate - 0.5)]]}

    monkeypatch.setattr(scripts["Bench"], "run", run)
    for rates in ((2.0, 4.0), (0.0625, 0.125), (0.25, 0.5, 1.0)):
        found = bench.tuned(scripts["Row"]("random", "", 0.0, 0, TOKENS), rates, 3, refuse)
        assert [(row["learning_rate"], row["seed"]) for row in found] == [(0.5, 0), (0.5, 1), (0.5, 2)]


@pytest.mark.parametrize(
    ("loss", "tokens"), [(5.0, 0.0), (4.0, 0.0), (3.0, 50.0), (2.0, 100.0), (1.5, 150.0), (0.5, None)]
)
def test_tokens_to_a_loss_lie_on_the_line_between_marks(
    scripts: dict[str, Any], loss: float, tokens: float | None
) -> None:
    assert scripts["tokens_to_reach"]({"curve": [[0, 4.0], [100, 2.0], [200, 1.0]]}, loss) == tokens


def test_clones_have_the_shape_of_the_random_init(scripts: dict[str, Any], bench: Any, tmp_path: Path) -> None:
    source = replace(LARGE, hidden=64, ffn=128, heads=8, kv_heads=4)
    large, small = saved(source, tmp_path / "large"), saved(SMALL, tmp_path / "small")
    sources = scripts["Sources"].measured(large, small, tmp_path / "importance", bench.held_out)
    for start, shape in (("subclone", LARGE), ("hyperclone", replace(LARGE, kv_heads=1))):
        expected = {name: tensor.shape for name, tensor in build(shape, 0).state_dict().items()}
        weights = {}
        for variant in scripts["VARIANTS"][start]:
            clone = sources.clone(scripts["Row"](start, variant, 1e-2, 0, TOKENS))
            assert {name: tensor.shape for name, tensor in clone.state_dict().items()} == expected
            weights[variant] = torch.cat([parameter.flatten() for parameter in clone.parameters()])
        distinct = {tuple(each.tolist()) for each in weights.values()}
        assert len(distinct) == len(weights) > 1


def test_copies_come_apart_with_noise_alone(scripts: dict[str, Any], bench: Any, tmp_path: Path) -> None:
    sources = scripts["Sources"](tmp_path, tmp_path, saved(SMALL, tmp_path / "small"))
    measure = scripts["separation"](bench.held_out[0])
    for variant in ("", "without noise"):
        row = scripts["Row"]("hyperclone", variant, 1e-2, 0, TOKENS)
        result = bench.run(row, sources.clone, measure)
        assert result["before"]["activations"] < 1e-5
        noisy = variant == ""
        assert (result["before"]["weights"] > 0.1) == (result["after"]["weights"] > 0.1) == noisy
        assert (result["after"]["activations"] > 1e-3) == noisy


def test_the_whole_table_and_its_picture(
    scripts: dict[str, Any], bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    shape = replace(LARGE, kv_heads=1)
    for name, value in {"LARGE": shape, "SMALL": SMALL, "CALIBRATION_TOKENS": 64}.items():
        monkeypatch.setitem(scripts["compare"].__globals__, name, value)
    source = saved(replace(LARGE, hidden=64, ffn=128, heads=8), tmp_path / "source")
    comparisons = [
        scripts["Comparison"]("subclone", 4.0, "AdamW", TOKENS, (1e-2,), (1e-2,), variants=("without rescale",)),
        scripts["Comparison"]("hyperclone", 2.2, "Muon", TOKENS, (1e-2,), (1e-2,), TOKENS, ("without noise",)),
    ]
    summary = {each.name: scripts["compare"](bench, each, source, Tokenizer(), 2) for each in comparisons}
    for each, found in zip(comparisons, summary.values(), strict=True):
        random, clone = found["random"], found["variants"][""]
        assert clone["tokens"] == int(TOKENS / each.fewer) and clone["optimizer"] == each.optimizer
        assert len(clone["end_losses"]) == len(random["end_losses"]) == 2 and len(found["variants"]) == 2
        below = [ours <= theirs for ours, theirs in zip(clone["end_losses"], random["end_losses"], strict=True)]
        assert found["holds_by_seed"] == below
        assert all(reached is not None for reached, yes in zip(clone["tokens_to_reach"], below, strict=True) if yes)
    listed = [asdict(each) for each in comparisons]
    content = {"settings": {"model": "tiny"}, "comparisons": listed, "summary": summary, "rows": bench.rows}
    scripts["draw"](json.loads(json.dumps(content)), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 2 * picture.height
