"""How fast routed experts are on one CPU thread, against the dense FFN and against a nested FFN of the same share.

    python scripts/bench_cpu_routed.py --out benchmarks/cpu_routed.json

Each token uses random blocks, as many as its share says: the worst case, since real tokens agree on some. The router is
timed with it. Interleaved as in ``bench_cpu.py``, with the thread's own CPU time, medians. Results are checked in the
same run. Takes about two minutes.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_cpu import TOLERANCE, Bench, environment, medians
from dynaconv.dynamic.router import Router

from dynaconv.dynamic.layout import RouterLayout
from dynaconv.kernels.dispatch import decide_routed, nested_ffn, routed_ffn
from dynaconv.kernels.reference import bit_masks, block_ffn

CANDIDATES = ["dense", "experts", "nested"]
SHARES = (0.25, 0.5, 0.75)
BATCHES = {1: 40, 8: 20, 64: 10, 256: 6}  # batch: repetitions


@dataclass
class RoutedBench(Bench):
    """The same networks with routers of routed experts. What is passed on as ``widths`` are bit masks here.

    Attributes:
        chooses: A router for each layer.
        width: Blocks of the nested FFN that it is compared with.
        nested_edges: Edges of these blocks.
    """

    chooses: list[Router]
    width: int
    nested_edges: tuple[int, ...]

    def experts(self, layer: int, x: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
        """What dynaconv runs, and a router whose answer is then not used."""
        router = self.chooses[layer]
        bit_masks(router.choose(router(x), 0.0))
        return routed_ffn(x, widths, self.weights[layer], self.edges)

    def nested(self, layer: int, x: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
        """A nested FFN of the same share, one width for all, without a router."""
        return nested_ffn(x, torch.full((len(x),), self.width), self.weights[layer], self.nested_edges)


def random_masks(tokens: int, blocks: int, share: float, seed: int) -> torch.Tensor:
    """``(tokens,)`` bit masks of round(share * blocks) random blocks each."""
    order = torch.rand(tokens, blocks, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return bit_masks(torch.zeros(tokens, blocks, dtype=torch.bool).scatter(1, order[:, : round(share * blocks)], True))


def measure(bench: RoutedBench, batch: int, share: float, repetitions: int) -> dict[str, Any]:
    """One row of the table."""
    weights, blocks = bench.weights[0], bench.blocks
    x, masks = torch.randn(batch, weights.up.shape[1], dtype=weights.up.dtype), random_masks(batch, blocks, share, 1)
    bench.width = round(share * (len(bench.nested_edges) - 1))
    cpu, wall = medians(bench, x, masks, CANDIDATES, repetitions)
    exact = weights._replace(gate=weights.gate.float(), up=weights.up.float(), down=weights.down.float())  # type: ignore[union-attr]
    expected = block_ffn(x.float(), masks, exact, bench.edges)
    found = routed_ffn(x, masks, weights, bench.edges).float()
    error = ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
    if not error <= TOLERANCE[x.dtype]:
        raise SystemExit(f"wrong result: relative error {error:.1e} at {x.dtype}, batch {batch}")
    return {
        "dtype": str(x.dtype).removeprefix("torch."),
        "blocks": blocks,
        "batch": batch,
        "active_share": share,
        "kernel": decide_routed(x, masks, weights, bench.edges).kernel,
        "milliseconds": dict(zip(CANDIDATES, [round(1e3 * value, 4) for value in cpu.tolist()], strict=True)),
        "wall_milliseconds": dict(zip(CANDIDATES, [round(1e3 * value, 4) for value in wall.tolist()], strict=True)),
        "speedup": dict(zip(CANDIDATES, [round(value, 3) for value in (cpu[0] / cpu).tolist()], strict=True)),
        "relative_error": float(f"{error:.2e}"),
    }


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    width: Annotated[int, typer.Option(help="Residual width, D.")] = 2048,
    neurons: Annotated[int, typer.Option(help="FFN width, F.")] = 8192,
    blocks: Annotated[str, typer.Option(help="Blocks, N, with commas.")] = "16,64",
    layers: Annotated[int, typer.Option(min=4, help="Layers of weights to rotate over.")] = 4,
) -> None:
    """Times routed experts against the dense FFN on one CPU thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for count in map(int, blocks.split(",")):
                made = Bench.random((width, neurons), count, layers, dtype)
                layout = RouterLayout("blocks", linear=True, rank=64 * -(-width // 1024))
                routers = [Router(width, made.edges, layout) for _ in range(layers)]
                eighths = tuple(neurons * n // 8 for n in range(9))
                bench = RoutedBench(made.weights, made.routers, made.edges, routers, 0, eighths)
                for batch, repetitions in BATCHES.items():
                    for share in SHARES:
                        rows.append(measure(bench, batch, share, repetitions))
                        typer.echo(json.dumps(rows[-1]))
    if out is not None:
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "environment": environment(),
            "shape": {"width": width, "neurons": neurons, "layers": layers},
            "rows": rows,
        }
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
