"""The benchmark of GPU kernels makes its cases and checks their results, on a CPU in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynaconv.artifacts.files import read_json

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_kernels.py"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    everything = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", **environment}
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], env=everything, capture_output=True, text=True)


def test_every_kind_of_case_is_right_on_a_tiny_shape(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed, and this runs its kernels")
    out = tmp_path / "kernels.json"
    done = run("--smoke", "--out", str(out), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = read_json(out)
    kinds = {row["kind"] for row in result["rows"]}
    assert kinds == {"dense", "sketch", "blocks", "nested", "loop over widths", "TEAL's scheme"}
    assert all(row["error"] <= 1e-2 for row in result["rows"] if "error" in row)
    assert "--smoke" in result["command"] and result["skipped"] == 0


def test_it_says_what_it_needs() -> None:
    done = run(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "no GPU is here" in done.stderr
