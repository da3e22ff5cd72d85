"""Memory and pace of resizing a checkpoint that does not fit into memory, beside a plain copy of it.

    python scripts/bench_resize_memory.py --out benchmarks/resize_memory.json

Makes a sparse 8B Llama in bf16 (scripts/make_synthetic_checkpoint.py), copies it shard by shard with the safetensors
library, grows its FFNs twofold and cuts its widths in half, each in a process of its own, one result on disk at a time.
Every process ends when its files are synced. The pace is bytes read and written a second. Takes about 20 minutes on a
disk that writes 100 MB/s, and 45 GB of it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

LIMIT_BYTES = 2_000_000_000
SLOWEST = 0.5  # of the plain copy's pace
SCRIPTS = Path(__file__).resolve().parent

COPY = """
import json, os, sys, time
from pathlib import Path
from safetensors.torch import load_file, save_file
from dynaconv.memory import peak_rss_bytes

source, folder = map(Path, sys.argv[1:3])
started = time.monotonic()
for shard in sorted(source.glob("*.safetensors")):
    save_file(load_file(shard), folder / shard.name)
    with (folder / shard.name).open("rb") as file:
        os.fsync(file.fileno())
print(json.dumps({"seconds": time.monotonic() - started, "peak_rss_bytes": peak_rss_bytes()}))
"""

RESIZE = """
import json, sys, time
from pathlib import Path
import torch
from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.config import HypercloneConfig, SubcloneConfig
from dynaconv.convert.compare import compare, random_batches
from dynaconv.convert.hyperclone import plan_hyperclone
from dynaconv.convert.importance import Importance
from dynaconv.convert.resize import write_resized
from dynaconv.convert.subclone import plan_subclone
from dynaconv.memory import peak_rss_bytes

source, folder, method = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
settings = json.loads(sys.argv[4])
checkpoint = Checkpoint.open(source)
started = time.monotonic()
if method == "hyperclone":
    resize = plan_hyperclone(checkpoint, HypercloneConfig(**settings), 0)
else:
    sizes, layers = checkpoint.sizes, checkpoint.layers
    drawn = torch.Generator().manual_seed(0)
    shapes = [(sizes["residual"],), (layers, sizes["ffn"]), (layers, sizes["q_head"], sizes["v_dim"]), (layers,)]
    scores = Importance(*(torch.rand(shape, generator=drawn) for shape in shapes))
    resize = plan_subclone(checkpoint, scores, SubcloneConfig(**settings))
write_resized(checkpoint, resize, folder, shard_bytes=4 * 1024**3)
found = {"seconds": time.monotonic() - started, "peak_rss_bytes": peak_rss_bytes()}
started = time.monotonic()
batches = random_batches(checkpoint.sizes["vocab"], windows=2, length=16, seed=0)
compared = compare(checkpoint, Checkpoint.open(folder), batches)
found["compare"] = {
    "seconds": time.monotonic() - started,
    "peak_rss_bytes": peak_rss_bytes(),
    "relative_difference": compared.relative,
}
print(json.dumps(found))
"""

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "hyperclone, FFN twofold, noisy": ("hyperclone", {"ffn": 2.0}),
    "hyperclone, FFN twofold, symmetric": ("hyperclone", {"ffn": 2.0, "variant": "symmetric"}),
    "subclone, widths halved": ("subclone", {"ratio": 0.5}),
}


def output_of(command: list[str]) -> str:
    """Standard output of ``command``; ends the benchmark when it fails."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def weights_bytes(folder: Path) -> int:
    """Bytes of all shards in ``folder``, holes included."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measured(name: str, script: str, source: Path, folder: Path, *arguments: str) -> dict[str, Any]:
    """Runs ``script`` from ``source`` into ``folder``, in a process of its own, and removes what it wrote."""
    folder.mkdir()
    os.sync()
    found: dict[str, Any] = json.loads(output_of([sys.executable, "-c", script, str(source), str(folder), *arguments]))
    found["bytes_read"], found["bytes_written"] = weights_bytes(source), weights_bytes(folder)
    found["bytes_per_s"] = round((found["bytes_read"] + found["bytes_written"]) / found["seconds"])
    shutil.rmtree(folder)
    print(f"{name}: {found['seconds']:.0f} s, {found['bytes_per_s'] / 1e6:.0f} MB/s, peak {found['peak_rss_bytes']:,}")
    return {"name": name, **found}


def main(
    out: Annotated[Path | None, typer.Option(help="Write the results here, as JSON.")] = None,
    size: Annotated[float, typer.Option("--bytes", help="Bytes of weights, about.")] = 16e9,
    hidden: Annotated[int, typer.Option(help="Residual width.")] = 4096,
    ffn: Annotated[int, typer.Option(help="Neurons of each FFN.")] = 14336,
    vocab: Annotated[int, typer.Option(help="Vocabulary.")] = 128256,
    folder: Annotated[
        Path | None, typer.Option(help="Where the large files go; a temporary folder unless given.")
    ] = None,
) -> None:
    """Measures a copy and every row, compares them, and ends with 1 where a limit is passed."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        source = Path(made) / "source"
        shape = ["--hidden", str(hidden), "--ffn", str(ffn), "--vocab", str(vocab), "--shard-bytes", str(4 * 1024**3)]
        script = str(SCRIPTS / "make_synthetic_checkpoint.py")
        print(output_of([sys.executable, script, str(source), "--bytes", str(size), *shape]), end="")
        copy = measured("plain copy", COPY, source, Path(made) / "copy")
        rows = [
            measured(name, RESIZE, source, Path(made) / "resized", method, json.dumps(settings))
            for name, (method, settings) in ROWS.items()
        ]
    for row in rows:
        row["pace_over_copy"] = round(row["bytes_per_s"] / copy["bytes_per_s"], 3)
        peak = max(row["peak_rss_bytes"], row["compare"]["peak_rss_bytes"])
        row["within_limits"] = peak <= LIMIT_BYTES and row["pace_over_copy"] >= SLOWEST
    shown = f"--bytes {size:g} --hidden {hidden} --ffn {ffn} --vocab {vocab}"
    result = {
        "command": f"python scripts/bench_resize_memory.py {shown}",
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
        "limits": {"peak_rss_bytes": LIMIT_BYTES, "pace_over_copy": SLOWEST},
        "copy": copy,
        "rows": rows,
    }
    text = json.dumps(result, indent=1)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    print(text)
    if not all(row["within_limits"] for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
