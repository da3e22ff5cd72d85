"""The quality benchmark says what its rows say, measures none twice, and draws them."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from dynaconv.evaluation.scoring import Score

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SETTINGS = {"model": "tiny", "tokens": 1000}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_quality

    yield bench_quality
    for name in ("bench_quality", "quality_plot"):
        sys.modules.pop(name, None)


def row(weights: str, policy: str, share: float, loss: float, seed: int = 0) -> dict[str, Any]:
    return {"weights": weights, "seed": seed, "policy": policy, "share": share, "loss": loss}


def test_a_finished_row_is_found_again_and_other_settings_are_not(bench: Any, tmp_path: Path) -> None:
    path, copy = tmp_path / "rows" / "rows.json", bench.Copy("nested", 1)
    measured = []

    def measure() -> Score:
        measured.append(1)
        shares = dict.fromkeys(("active_share", "exact_share", "bytes_share", "flops_share"), 0.5)
        return Score(loss=2.5, **shares, agreement=None, tokens=9, widths=(4.0,))

    first = bench.Rows(path, SETTINGS, copy).row("nested", "routed", 0.5, measure)
    assert (first["loss"], first["seed"], len(measured)) == (2.5, 1, 1)
    assert bench.Rows(path, SETTINGS, copy).row("nested", "routed", 0.5, measure) == first and len(measured) == 1
    bench.Rows(path, SETTINGS, copy).row("nested", "routed", 0.25, measure)
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
    picture = tmp_path / "docs" / "quality.png"
    bench.draw({"settings": SETTINGS, "summary": found}, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_copy_is_a_recipe_on_the_same_tokens(bench: Any, tmp_path: Path) -> None:
    configs = {copy.name: copy.config(tmp_path, tmp_path / "text", 4096) for copy in bench.COPIES}
    assert len(configs) == len(bench.COPIES)
    assert {config.finetune.tokens for config in configs.values()} == {4096}
    assert [configs[f"nested-{seed}"].seed for seed in (0, 1)] == [0, 1]
    dense = configs["dense-0"].finetune
    assert (dense.router, dense.losses.full.weight, dense.losses.distill.weight) == ("uniform", 1.0, 0.0)
