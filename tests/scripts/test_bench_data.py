"""The data benchmark runs from end to end and reports every kind of windows."""

from __future__ import annotations

import runpy
from pathlib import Path

from conftest import make_checkpoint

from dynaconv.artifacts.files import read_json

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_data.py"


def test_a_small_measurement(tmp_path: Path, text_file: Path) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    folder, out = make_checkpoint(tmp_path / "model"), tmp_path / "out" / "data.json"
    main(folder, out, str(text_file), tokens=10_000, batch=2, length=32, copies=2, repeats=1)
    result = read_json(out)
    assert set(result["tokenising"]) == {"workers 1", "workers 2"}
    assert set(result["assembly"]) == {"memory", "disk", "mixture", "padded"}
    measured = [*result["tokenising"].values(), *result["assembly"].values(), result["training"]]
    assert all(rate["tokens_per_s"] > 0 for rate in measured)
    assert result["checkpoint"] == "model" and result["batch"] == [2, 32]
