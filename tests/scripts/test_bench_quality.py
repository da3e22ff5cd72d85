"""The quality benchmark says what its rows say, measures none twice, and draws them."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_checkpoint

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.artifacts.files import read_json
from dynaconv.errors import ConfigError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SETTINGS = {"model": "tiny", "valid": "valid.txt", "tokens": 1000}
PARTS = ("plot", "rows", "text", "tuned", "ffn", "peers", "quantised")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_quality

    yield bench_quality
    for name in ("bench_quality", *(f"quality_{part}" for part in PARTS)):
        sys.modules.pop(name, None)


def row(weights: str, policy: str, share: float, loss: float, seed: int = 0) -> dict[str, Any]:
    key = {"weights": weights, "seed": seed, "policy": policy, "share": share}
    return {**key, "loss": loss, "bytes_share": share}


def test_a_finished_row_is_found_again_and_other_settings_are_not(bench: Any, tmp_path: Path) -> None:
    path, copy = tmp_path / "rows" / "rows.json", bench.Copy("nested", 1)
    measured = []

    def measure() -> Any:
        measured.append(1)
        return bench.MethodScore(2.5, None, bytes_share=0.5, flops_share=0.6, active_share=0.4, widths=(4.0,))

    first = bench.Rows(path, SETTINGS, copy.seed, 0.75).row("nested", "routed", 0.5, measure)
    assert (first["loss"], first["seed"], len(measured)) == (2.5, 1, 1)
    assert (first["bytes_share"], first["flops_share"], first["active_share"]) == (0.5, 0.6, 0.4)
    assert first["linear_bytes_share"] == 0.625, "a quarter is not of FFNs, and read in full"
    assert bench.Rows(path, SETTINGS, copy.seed).row("nested", "routed", 0.5, measure) == first and len(measured) == 1
    bench.Rows(path, SETTINGS, copy.seed).row("nested", "routed", 0.25, measure)
    assert len(measured) == 2 and len(bench.known_rows(path, SETTINGS)) == 2
    assert bench.known_rows(path, {**SETTINGS, "tokens": 2000}) == []


def test_what_the_summary_says(bench: Any, tmp_path: Path) -> None:
    rows = [
        row("parent", "dense", 1.0, 2.2),
        row("carved for nested", "uniform width", 0.5, 9.0),
        row("nested", "full dial", 1.0, 2.02),
        row("nested", "routed", 0.5, 2.1),
        row("nested", "uniform width", 0.5, 9.0),
        row("nested", "routed", 0.5, 2.3, seed=1),
        row("nested-uniform", "uniform width", 0.5, 2.5),
        row("routed", "routed", 0.5, 2.05),
        row("static-half", "uniform width", 0.5, 2.15),
        row("dense", "full dial", 1.0, 2.0),
    ]
    found = bench.summary(rows)
    assert found["loss"]["nested"] == {"1": [2.02], "0.5": [2.1, 2.3]}
    assert not any("carved" in weights for weights in found["loss"])
    assert found["full_dial_cost"] == {"nested": [pytest.approx(0.01)]}
    assert found["perplexity_over"]["nested"]["0.5"] == [pytest.approx(math.expm1(0.1)), pytest.approx(math.expm1(0.3))]
    assert found["ahead"]["nested"]["nested-uniform"]["0.5"] == pytest.approx(0.3)
    assert found["ahead"]["nested"]["static-half"]["0.5"] == pytest.approx(-0.05), "behind is below zero"
    assert found["ahead"]["routed"]["nested"]["0.5"] == pytest.approx(0.15)
    drawn = bench.curves(
        [*rows, row("TEAL", "0.5 of inputs off", 0.5, 2.7), row("TEAL", "0.75 of inputs off", 0.25, 4.2)]
    )
    rounded = {name: [[(x, round(y, 6)) for x, y in points] for points in seeds] for name, seeds in drawn.items()}
    assert rounded == {
        "TEAL": [[(0.25, 2.0), (0.5, 0.5)]],
        "nested, tuned": [[(0.5, -0.1), (1.0, -0.18)], [(0.5, 0.1)]],
        "nested-uniform, tuned": [[(0.5, 0.3)]],
        "routed, tuned": [[(0.5, -0.15)]],
        "static-half, tuned": [[(0.5, -0.05)]],
    }
    picture = tmp_path / "docs" / "quality.png"
    bench.draw({"settings": SETTINGS, "curves": drawn}, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_copy_is_a_recipe_on_the_same_tokens(bench: Any, tmp_path: Path) -> None:
    configs = {copy.name: copy.config(tmp_path, tmp_path / "text", 4096) for copy in bench.COPIES}
    assert len(configs) == len(bench.COPIES)
    assert {config.finetune.tokens for config in configs.values()} == {4096}
    assert [configs[f"nested-{seed}"].seed for seed in (0, 1)] == [0, 1]
    dense = configs["dense-0"].finetune
    assert (dense.router, dense.losses.full.weight, dense.losses.distill.weight) == ("uniform", 1.0, 0.0)


def test_one_command_measures_the_baselines(bench: Any, tmp_path: Path, text_file: Path) -> None:
    model, runs, out = make_checkpoint(tmp_path / "model"), tmp_path / "runs", tmp_path / "quality.json"

    def measure(only: str) -> Any:
        options = {"calibration": text_file, "count": 18, "length": 16, "only": only, "runs": runs, "out": out}
        bench.main(model, text_file, True, picture=tmp_path / "quality.png", exclude="", **_rest(bench), **options)
        return read_json(out)

    found = measure("TEAL;oracle (choice not counted)")
    copy = Checkpoint.open(runs / "model-bf16")
    assert copy.dtype == torch.bfloat16 and Checkpoint.open(model).dtype == torch.float32
    assert {row["weights"] for row in found["rows"]} == {"parent", "TEAL", "oracle (choice not counted)"}
    assert found["settings"]["text"] == text_file.name and found["settings"]["windows"] == 18
    head, attention, ffn = 257 * 64, 2 * (2 * 64 * 64 + 2 * 64 * 32), 2 * 3 * 64 * 96
    for row in found["rows"]:
        linear = (head + attention + row["bytes_share"] * ffn) / (head + attention + ffn)
        assert row["linear_bytes_share"] == pytest.approx(linear)
    more = measure("CATS")["rows"]
    assert more[: len(found["rows"])] == found["rows"] and more[-1]["weights"] == "CATS"
    with pytest.raises(ConfigError, match=r"TEALL.*\n.*'TEAL'"):
        measure("TEALL")


def _rest(bench: Any) -> dict[str, Any]:
    return {"half": bench.Half.bf16, "tokens": 0, "threads": 1}


def test_as_many_windows_as_are_asked_for(bench: Any, tmp_path: Path, text_file: Path) -> None:
    from dynaconv.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(make_checkpoint(tmp_path / "model"))
    sizes = [tuple(batch.input_ids.shape) for batch in bench.windows(tokenizer, text_file, 20, 8)]
    assert sizes == [(16, 8), (4, 8)]
    assert [len(batch.input_ids) for batch in bench.windows(tokenizer, text_file)] == [16] * 10
