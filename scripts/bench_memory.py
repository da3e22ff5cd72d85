"""Peak memory of carving a checkpoint larger than memory should hold, against what ``dynaconv plan`` said before.

    python scripts/bench_memory.py --out benchmarks/memory.json

Makes a sparse 4 GB Llama with statistics (scripts/make_synthetic_checkpoint.py) in a temporary folder, asks the plan,
carves in a process of its own, and removes everything; in bf16, then in fp32. Takes about 3 minutes and 5 GB of disk.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

LIMIT_BYTES = 1_500_000_000
TOLERANCE = 0.25
SCRIPTS = Path(__file__).resolve().parent
DYNACONV = [sys.executable, "-c", "from dynaconv.cli.app import main; main()"]

CARVE = """
import json, sys, time
from pathlib import Path
from dynaconv.config import RunConfig
from dynaconv.convert.stage import CarveStage
from dynaconv.memory import peak_rss_bytes
from dynaconv.pipeline.stage import StageContext
from dynaconv.progress import Progress

dense, statistics, folder, work = map(Path, sys.argv[1:5])
config = RunConfig(source=str(dense), experts="nested", blocks=int(sys.argv[5]))
started = time.monotonic()
with Progress() as progress:
    inputs = {"dense": dense, "statistics": statistics}
    metrics = CarveStage().run(StageContext(config, inputs, folder, work, progress))
seconds = round(time.monotonic() - started, 1)
print(json.dumps({"peak_rss_bytes": peak_rss_bytes(), "seconds": seconds, "layers": metrics["layers"]}))
"""


def output_of(command: list[str]) -> str:
    """Standard output of ``command``; ends the benchmark when it fails."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def planned(dense: Path, blocks: int) -> dict[str, Any]:
    """What ``dynaconv plan`` says of the carve stage."""
    plan = output_of(
        [*DYNACONV, "plan", str(dense), "--recipe", "nested", "--until", "carve", "--json", f"blocks={blocks}"]
    )
    return next(stage for stage in json.loads(plan)["stages"] if stage["name"] == "carve")


def measure(folder: Path, size: float, dtype: str, blocks: int) -> dict[str, Any]:
    """Makes a checkpoint of ``size`` bytes in ``folder``, plans and carves it."""
    dense, statistics, carved, work = (folder / name for name in ("dense", "statistics", "carved", "work"))
    script = str(SCRIPTS / "make_synthetic_checkpoint.py")
    options = ["--bytes", str(size), "--dtype", dtype, "--statistics", str(statistics), "--blocks", str(blocks)]
    print(output_of([sys.executable, script, str(dense), *options]), end="")
    plan = planned(dense, blocks)
    carved.mkdir()
    work.mkdir()
    paths = [str(path) for path in (dense, statistics, carved, work)]
    found = json.loads(output_of([sys.executable, "-c", CARVE, *paths, str(blocks)]))
    written = sum(path.stat().st_size for path in carved.iterdir())
    return {
        "dtype": dtype,
        "layers": found["layers"],
        "seconds": found["seconds"],
        "peak_rss_bytes": found["peak_rss_bytes"],
        "planned_peak_bytes": plan["peak_bytes"],
        "planned_over_measured": round(plan["peak_bytes"] / found["peak_rss_bytes"], 3),
        "bytes_written": written,
        "planned_disk_bytes": plan["estimate"]["disk_bytes"],
    }


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    size: Annotated[float, typer.Option("--bytes", help="Bytes of weights.")] = 4e9,
    blocks: Annotated[int, typer.Option(help="Blocks, N.")] = 8,
    folder: Annotated[Path | None, typer.Option(help="Where the temporary files go.")] = None,
) -> None:
    """Carves synthetic checkpoints in bf16 and fp32 and compares peak memory with the plan and the limit."""
    rows = []
    for dtype in ("BF16", "F32"):
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            row = measure(Path(temporary), size, dtype, blocks)
        small = row["peak_rss_bytes"] < LIMIT_BYTES
        near = abs(row["planned_over_measured"] - 1) <= TOLERANCE
        rows.append({**row, "below_limit": small, "plan_within_tolerance": near})
        print(json.dumps(rows[-1]))
    if out is not None:
        environment = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "environment": {**environment, "system": platform.system(), "threads": torch.get_num_threads()},
            "checkpoint_bytes": size,
            "limit_bytes": LIMIT_BYTES,
            "tolerance": TOLERANCE,
            "rows": rows,
        }
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not all(row["below_limit"] and row["plan_within_tolerance"] for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
