"""How fast the nested FFN is on one CPU thread, against the dense FFN and the loop over widths that everyone writes.

    python scripts/bench_cpu.py --out benchmarks/cpu.json

Every candidate runs once in every repetition, each on another layer's weights, so that drift of a shared machine hits
all alike and no cache holds what is timed. The clock is the thread's own CPU time, which on an idle machine is the time
on the wall (reported beside it) and does not count the moments another process had the core. Mixed batches are several
draws of random widths: each candidate's time is the median over repetitions of one draw, averaged over the draws.
Results are checked in the same run. Takes two to three minutes.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from dynaconv.kernels.cpu import prefix_ffn
from torch.nn.functional import linear, silu

from dynaconv.kernels.dispatch import decide, nested_ffn
from dynaconv.kernels.reference import block_ffn, hidden_neurons, width_masks
from dynaconv.kernels.weights import FFNWeights

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
ONE_WIDTH_SHARES = (0.25, 0.5, 0.75, 1.0)
MIXED = {8: (48, 4), 64: (8, 5), 256: (4, 4)}  # batch: draws of widths, repetitions of each
ONE_WIDTH_REPETITIONS = 60
WARM_UP = 2  # repetitions not timed, in which oneDNN compiles its kernels


@dataclass
class Bench:
    """What is timed on: ``layers`` random networks of one shape and dtype, each with a router in front."""

    weights: list[FFNWeights]
    routers: list[torch.nn.Module]
    edges: tuple[int, ...]

    @classmethod
    def random(cls, shape: tuple[int, int], blocks: int, layers: int, dtype: torch.dtype) -> Bench:
        """Draws the weights. ``shape`` is (D, F)."""
        wide, neurons = shape
        networks = [
            FFNWeights(
                _random(neurons, wide, dtype), _random(neurons, wide, dtype), _random(wide, neurons, dtype), silu
            )
            for _ in range(layers)
        ]
        routers: list[torch.nn.Module] = [
            torch.nn.Sequential(torch.nn.Linear(wide, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1)).to(dtype)
            for _ in range(layers)
        ]
        return cls(networks, routers, tuple(neurons * n // blocks for n in range(blocks + 1)))

    @property
    def blocks(self) -> int:
        """Number of blocks, N."""
        return len(self.edges) - 1

    def dense(self, layer: int, x: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
        """All neurons for all tokens, as transformers computes them."""
        weights = self.weights[layer]
        return linear(hidden_neurons(x, weights), weights.down)

    def nested(self, layer: int, x: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
        """What dynaconv runs."""
        return nested_ffn(x, widths, self.weights[layer], self.edges)

    def routed(self, layer: int, x: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
        """The same with the cost of a router, whose answer is then not used."""
        self.routers[layer](x).mul(self.blocks).round().clamp(0, self.blocks).long()
        return self.nested(layer, x, widths)

    def per_class(self, layer: int, x: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
        """The loop over the widths that occur: gather the tokens, compute, scatter."""
        out = torch.empty_like(x)
        for width in sorted(set(widths.tolist())):
            rows = (widths == width).nonzero().squeeze(1)
            out[rows] = prefix_ffn(x[rows], width, self.weights[layer], self.edges)
        return out


@dataclass
class Row:
    """One line of the table: a case, the time of each candidate, and how many times as long dense takes."""

    dtype: str
    batch: int
    mix: str
    active_share: float
    largest_share: float
    kernel: str
    milliseconds: dict[str, float]
    wall_milliseconds: dict[str, float]
    speedup: dict[str, float]
    relative_error: float


def _random(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """A weight of the size found in real models."""
    return torch.randn(rows, columns, dtype=dtype) * 0.02


def cases(blocks: int, seed: int) -> Iterator[tuple[str, torch.Tensor, int]]:
    """What is mixed, widths ``(draws, M)`` and repetitions; the same for every dtype.

    One token of each share, then batches of uniformly random widths 0..N, and the worst of these for a nested FFN: few
    tokens of which one uses everything, so that every weight is read.
    """
    generator = torch.Generator().manual_seed(seed)
    for share in ONE_WIDTH_SHARES:
        yield "one width", torch.tensor([[round(share * blocks)]]), ONE_WIDTH_REPETITIONS
    for batch, (draws, repetitions) in MIXED.items():
        widths = torch.randint(0, blocks + 1, (draws, batch), generator=generator)
        yield "mixed", widths, repetitions
        if batch == min(MIXED):
            worst = widths.clone()
            worst[:, 0] = blocks
            yield "one full", worst, repetitions


def measure(bench: Bench, mix: str, draws: torch.Tensor, candidates: list[str], repetitions: int) -> Row:
    """Times ``candidates`` on every batch of widths in ``draws``, ``(draws, M)`` int64."""
    weights = bench.weights[0]
    batch = draws.shape[1]
    cpu, wall = torch.zeros(len(candidates)), torch.zeros(len(candidates))
    for widths in draws:
        x = torch.randn(batch, weights.up.shape[1], dtype=weights.up.dtype)
        cpu_seconds, wall_seconds = medians(bench, x, widths, candidates, repetitions)
        cpu += cpu_seconds * 1e3 / len(draws)
        wall += wall_seconds * 1e3 / len(draws)
    return Row(
        dtype=str(weights.up.dtype).removeprefix("torch."),
        batch=batch,
        mix=mix,
        active_share=round(draws.double().mean().item() / bench.blocks, 4),
        largest_share=round(draws.amax(dim=1).double().mean().item() / bench.blocks, 4),
        kernel=decide(x, widths, weights, bench.edges).kernel,
        milliseconds=_named(candidates, cpu),
        wall_milliseconds=_named(candidates, wall),
        speedup=_named(candidates, cpu[candidates.index("dense")] / cpu),
        relative_error=relative_error(bench, x, widths),
    )


def medians(
    bench: Bench, x: torch.Tensor, widths: torch.Tensor, candidates: list[str], repetitions: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Median seconds of each candidate, by the thread's CPU clock and by the wall clock, ``(candidates,)`` each."""
    cpu = torch.zeros(repetitions, len(candidates))
    wall = torch.zeros(repetitions, len(candidates))
    for repetition in range(-WARM_UP, repetitions):
        for turn in range(len(candidates)):
            which = (turn + repetition) % len(candidates)
            candidate: Callable[..., torch.Tensor] = getattr(bench, candidates[which])
            begin, begin_wall = time.thread_time(), time.perf_counter()
            candidate((repetition + turn) % len(bench.weights), x, widths)
            if repetition >= 0:
                cpu[repetition, which] = time.thread_time() - begin
                wall[repetition, which] = time.perf_counter() - begin_wall
    return cpu.median(dim=0).values, wall.median(dim=0).values


def _named(candidates: list[str], values: torch.Tensor) -> dict[str, float]:
    return {name: round(value, 4) for name, value in zip(candidates, values.tolist(), strict=True)}


def relative_error(bench: Bench, x: torch.Tensor, widths: torch.Tensor) -> float:
    """Largest relative error of a row of the nested FFN, against the reference in fp32.

    Raises:
        SystemExit: It is over the tolerance: a fast wrong answer is not worth timing.
    """
    weights = bench.weights[0]
    exact = weights._replace(gate=weights.gate.float(), up=weights.up.float(), down=weights.down.float())  # type: ignore[union-attr]
    expected = block_ffn(x.float(), width_masks(widths), exact, bench.edges)
    found = bench.nested(0, x, widths).float()
    norms = expected.norm(dim=1).clamp_min(1e-30)
    error = ((found - expected).norm(dim=1) / norms)[widths > 0].max().item() if bool((widths > 0).any()) else 0.0
    if not error <= TOLERANCE[x.dtype]:
        raise SystemExit(f"wrong result: relative error {error:.1e} at {x.dtype}, batch {len(x)}")
    return float(f"{error:.2e}")


def targets(rows: list[Row], candidate: str) -> list[dict[str, Any]]:
    """What the project promises of these rows, and whether ``candidate`` keeps it."""
    checks = []
    for row in rows:
        if row.mix == "one width" and row.batch == 1 and row.active_share < 1:
            goal, text = 0.85 / row.active_share, "at least 0.85 of 1/share"
        elif row.mix == "mixed" and row.batch in (8, 64):
            goal, text = 1.0, "no slower than dense"
        elif row.mix == "mixed" and row.batch == 256:
            goal, text = 1.5, "at least 1.5x dense"
        else:
            continue
        case = f"{row.dtype}, batch {row.batch}, {row.mix}, share {row.active_share:g}"
        speedup = row.speedup[candidate]
        checks.append(
            {"case": case, "target": text, "goal": round(goal, 3), "speedup": speedup, "pass": speedup >= goal}
        )
    return checks


def environment() -> dict[str, Any]:
    """What the numbers were measured on."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load": [
            round(value, 2) for value in os.getloadavg()
        ],  # processes that wanted a core, over 1, 5 and 15 minutes
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def show(row: Row) -> None:
    """Prints one line of the table."""
    times = "  ".join(f"{name} {value:.2f} ms ({row.speedup[name]:.2f}x)" for name, value in row.milliseconds.items())
    print(f"{row.dtype:9} batch {row.batch:3} {row.mix:9} share {row.active_share:.2f}  {row.kernel:9} {times}")


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    width: Annotated[int, typer.Option(help="Residual width, D.")] = 2048,
    neurons: Annotated[int, typer.Option(help="FFN width, F.")] = 8192,
    blocks: Annotated[int, typer.Option(help="Blocks, N.")] = 8,
    layers: Annotated[int, typer.Option(min=4, help="Layers of weights to rotate over.")] = 4,
    router: Annotated[bool, typer.Option(help="Also time the nested FFN with a router in front.")] = True,
    effort: Annotated[float, typer.Option(help="Multiplies the number of repetitions.")] = 1.0,
    seed: int = 0,
) -> None:
    """Times the nested FFN against the dense one on one CPU thread."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rows: list[Row] = []
    candidates = ["dense", "nested", *(["routed"] if router else [])]
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            bench = Bench.random((width, neurons), blocks, layers, dtype)
            for mix, draws, repetitions in cases(blocks, seed):
                names = candidates if draws.shape[1] == 1 else [*candidates, "per_class"]
                rows.append(measure(bench, mix, draws, names, max(3, round(effort * repetitions))))
                show(rows[-1])
    checks = targets(rows, "nested")
    for check in checks:
        verdict = "pass" if check["pass"] else "FAIL"
        print(f"{verdict}  {check['case']}: {check['speedup']}x, {check['target']} ({check['goal']})")
    if out is not None:
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "environment": environment(),
            "shape": {"width": width, "neurons": neurons, "blocks": blocks, "layers": layers},
            "rows": [asdict(row) for row in rows],
            "targets": checks,
            "targets_with_router": targets(rows, "routed") if router else [],
        }
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
