"""Times GPU calls for ``bench_kernels.py``: one CUDA graph over all layers, so that no cache holds a weight."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

REPLAYS = 50
Call = Callable[[int], Any]
"""Runs layer i, on weights of its own."""


def in_graph(call: Call, layers: int) -> dict[str, float]:
    """Microseconds of one layer in a CUDA graph over ``layers`` of them: median, p10 and p90 of the replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for layer in range(layers):  # compiles kernels, and packs what is packed once
            call(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            call(layer)
    return _quantiles(graph.replay, layers)


def eager(call: Call, layers: int) -> dict[str, float]:
    """The same, launched one by one from Python."""

    def chain() -> None:
        for layer in range(layers):
            call(layer)

    chain()
    return _quantiles(chain, layers)


def _quantiles(chain: Callable[[], Any], layers: int) -> dict[str, float]:
    chain()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]
    for start, end in marks:
        start.record()
        chain()
        end.record()
    torch.cuda.synchronize()
    times = sorted(1000 * start.elapsed_time(end) / layers for start, end in marks)
    tenth = REPLAYS // 10
    return {"median_us": statistics.median(times), "p10_us": times[tenth], "p90_us": times[-1 - tenth]}


def ceilings(device: torch.device) -> dict[str, float]:
    """GB/s of copying 1 GiB (bytes read and written) and of reading it alone, and bf16 TFLOP/s of a product."""
    source = torch.ones(1 << 28, dtype=torch.float32, device=device)
    target, total = torch.empty_like(source), torch.empty((), device=device)
    size = source.numel() * source.element_size()
    copied = in_graph(lambda _: target.copy_(source), 4)["median_us"]
    read = in_graph(lambda _: torch.sum(source, dim=0, out=total), 4)["median_us"]
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    product = torch.empty_like(square)
    multiplied = in_graph(lambda _: torch.mm(square, square, out=product), 2)["median_us"]
    return {
        "copy_gb_s": 2 * size / copied / 1e3,
        "read_gb_s": size / read / 1e3,
        "bf16_tflops": 2 * 8192**3 / multiplied / 1e6,
    }
