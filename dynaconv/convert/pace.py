"""How long a resize will take, from the pace at which a piece of the source goes through right now."""

from __future__ import annotations

import time

import torch

from dynaconv.arch.checkpoint import Checkpoint

SAMPLE_BYTES = 64 * 1024**2


def expected_seconds(checkpoint: Checkpoint, result: Checkpoint) -> float:
    """Seconds to read ``checkpoint`` and write ``result``, when both go as fast as a sample of the source now.

    The sample is read, its columns are moved, and it is copied as writing would; a disk that writes slower than it
    reads takes longer.
    """
    reader = checkpoint.reader
    info = max(reader.tensors.values(), key=lambda each: each.nbytes if len(each.shape) == 2 else 0)
    rows = max(1, min(info.shape[0], SAMPLE_BYTES * info.shape[0] // max(1, info.nbytes)))
    begun = time.perf_counter()
    sample = reader.read_finite(info.name, (0, rows))
    moved = sample.index_select(1, torch.arange(sample.shape[1] - 1, -1, -1)) if sample.dim() == 2 else sample
    moved.clone()
    taken = time.perf_counter() - begun
    return taken * (reader.total_bytes + result.reader.total_bytes) / (2 * max(1, sample.nbytes))
