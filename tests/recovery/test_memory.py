"""Copying a checkpoint needs memory for one tensor, however large the checkpoint is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynaconv.artifacts.header import plan_file
from dynaconv.memory import reset_peak

TENSOR_BYTES, TENSORS = 24 * 2**20, 25
ALLOWED_BYTES = 150 * 10**6

COPY = """
import sys
from pathlib import Path
from dynaconv.artifacts.tensors import CheckpointReader, CheckpointWriter
from dynaconv.memory import peak_rss_bytes, reset_peak
reset_peak()
before = peak_rss_bytes()
reader = CheckpointReader(Path(sys.argv[1]))
layout = [(info.name, info.dtype, info.shape) for info in reader.tensors.values()]
with CheckpointWriter(Path(sys.argv[2]), layout, shard_bytes=200 * 2**20) as writer:
    for i, name in enumerate(reader.tensors):
        tensor = reader.read_finite(name)
        writer.write(name, tensor if i % 8 else tensor.t().contiguous().t())
print(reader.total_bytes, peak_rss_bytes() - before)
"""


@pytest.mark.skipif(not reset_peak(), reason="the high-water mark of memory cannot be set back here")
def test_copy_of_600_mb_stays_small(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = [(f"layer.{i}.w", "F32", (3072, 2048)) for i in range(TENSORS)]
    head, entries = plan_file(tensors, {})
    with (source / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(entries[-1].stop)  # holes: zeros that take no space
    shared_memory = Path("/dev/shm")
    fast = shared_memory.is_dir() and os.access(shared_memory, os.W_OK)
    space = os.statvfs(shared_memory).f_bavail * os.statvfs(shared_memory).f_bsize if fast else 0
    target = (shared_memory if space > 10**9 else tmp_path) / f"{tmp_path.name}-copy"
    try:
        done = subprocess.run(
            [sys.executable, "-c", COPY, str(source), str(target)], capture_output=True, text=True, check=True
        )
    finally:
        for path in target.glob("*"):
            path.unlink()
        target.rmdir()
    total, growth = (int(text) for text in done.stdout.split())
    assert total == TENSORS * TENSOR_BYTES
    assert growth < ALLOWED_BYTES
    assert growth > TENSOR_BYTES  # else nothing was measured
