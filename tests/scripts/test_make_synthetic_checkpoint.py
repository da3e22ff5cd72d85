"""Synthetic checkpoints are real enough to open and carve, take no disk, and show that carving them takes no memory."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from dynaconv.arch.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "make_synthetic_checkpoint.py"

CARVE = """
import json, sys
from pathlib import Path
from dynaconv.config import RunConfig
from dynaconv.convert.stage import CarveStage
from dynaconv.memory import peak_rss_bytes, reset_peak, rss_bytes
from dynaconv.pipeline.stage import StageContext
from dynaconv.progress import Progress

dense, statistics, folder = map(Path, sys.argv[1:])
estimate = CarveStage().estimate(RunConfig(experts="nested", blocks=8), dense)
before, known = rss_bytes(), reset_peak()
inputs = {"dense": dense, "statistics": statistics}
CarveStage().run(StageContext(RunConfig(experts="nested", blocks=8), inputs, folder, folder, Progress(quiet=True)))
print(json.dumps({"known": known, "grown": peak_rss_bytes() - before, "estimate": estimate.peak_bytes}))
"""


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_size_is_what_was_asked_and_the_disk_is_not_used(tmp_path: Path, dtype: str) -> None:
    script = runpy.run_path(str(SCRIPT))
    folder = tmp_path / "big"
    script["main"](folder, size=6e8, dtype=script["DType"](dtype), hidden=512, ffn=1001, vocab=1000, shard_bytes=1e8)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.reader.total_bytes == pytest.approx(6e8, rel=0.02)
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) >= 6 and all(shard.stat().st_size < 1.01e8 for shard in shards)
    assert sum(shard.stat().st_blocks * 512 for shard in shards) < 5e7
    assert all(checkpoint.reader.read_finite(name).any() for name in checkpoint.names_of_layer(0))


def test_carving_holds_no_more_than_it_said(tmp_path: Path) -> None:
    """In a process of its own: memory grows by the estimate and what libraries set up, not by the checkpoint."""
    script = runpy.run_path(str(SCRIPT))
    dense, statistics, folder = tmp_path / "dense", tmp_path / "statistics", tmp_path / "carved"
    bf16 = script["DType"].bf16
    script["main"](
        dense, size=4e8, dtype=bf16, hidden=1024, ffn=4096, vocab=32000, shard_bytes=2e8, statistics=statistics
    )
    folder.mkdir()
    command = [sys.executable, "-c", CARVE, *map(str, (dense, statistics, folder))]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
    if not found["known"]:
        pytest.skip("this system does not tell a process's peak memory apart from its past")
    assert found["estimate"] < 4e7
    assert found["grown"] < found["estimate"] + 8e7
    assert Checkpoint.open(folder).reader.total_bytes == pytest.approx(4e8, rel=0.05)
