"""Timing candidates side by side on one CPU thread. A part of ``bench_cpu.py``.

Every candidate runs once in every repetition, each on another layer's weights, so that drift of a shared machine hits
all alike and no cache holds what is timed. The clock is the thread's own CPU time, which on an idle machine is the time
on the wall (reported beside it) and does not count the moments another process had the core.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
WARM_UP = 2  # repetitions not timed, in which kernels are compiled


class Times(NamedTuple):
    """Median seconds of each candidate, by the thread's CPU clock and by the wall clock."""

    cpu: list[float]
    wall: list[float]


def medians(candidates: Mapping[str, Callable[[int], Tensor]], layers: int, repetitions: int) -> Times:
    """Times ``candidates``, each called with one of so many layers."""
    runs = list(candidates.values())
    cpu = torch.zeros(repetitions, len(runs), dtype=torch.float64)
    wall = torch.zeros_like(cpu)
    for repetition in range(-WARM_UP * layers, repetitions):
        for turn in range(len(runs)):
            which = (turn + repetition) % len(runs)
            begin, begin_wall = time.thread_time(), time.perf_counter()
            runs[which]((repetition + turn) % layers)
            if repetition >= 0:
                cpu[repetition, which] = time.thread_time() - begin
                wall[repetition, which] = time.perf_counter() - begin_wall
    return Times(cpu.median(dim=0).values.tolist(), wall.median(dim=0).values.tolist())


def named(names: Iterable[str], values: Tensor) -> dict[str, float]:
    """``values`` by name, rounded."""
    return {name: round(value, 4) for name, value in zip(names, values.tolist(), strict=True)}


def row_errors(found: Tensor, expected: Tensor) -> float:
    """Largest relative error of a row of ``found`` (M, D)."""
    difference, size = (found.float() - expected.float()).norm(dim=1), expected.float().norm(dim=1)
    return float(f"{(difference / size.clamp_min(1e-30)).max().item():.2e}")


def check(error: float, tolerance: float, case: str) -> None:
    """Stops at a wrong result: a fast wrong answer is not worth timing.

    Raises:
        SystemExit: The error is over the tolerance, or is no number.
    """
    if not error <= tolerance:
        raise SystemExit(f"wrong result: relative error {error:.1e} at {case}")


def verdict(case: str, target: str, goal: float, speedup: float) -> dict[str, Any]:
    """Whether a target is met."""
    return {"case": case, "target": target, "goal": round(goal, 3), "speedup": speedup, "pass": speedup >= goal}


def times_text(milliseconds: Mapping[str, float], speedup: Mapping[str, float]) -> str:
    """Times of all candidates for a line of a table."""
    return "  ".join(f"{name} {value:.2f} ms ({speedup[name]:.2f}x)" for name, value in milliseconds.items())
