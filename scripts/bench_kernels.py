"""How fast the Triton kernels are on one GPU, against the best dense FFN and other ways to leave weights unread.

    python scripts/bench_kernels.py --out benchmarks/gpu.json

First the ceilings of the machine, then every case in a CUDA graph over several layers with weights of their own, at
least 0.5 GB of them; median, p10 and p90 of 50 replays. Results are checked in the same run, against float32. Tokens
use random neurons, which is the worst case for several at once. Peers, under their names: three dense forms and
``torch.compile`` (the fastest is what ratios refer to); TEAL's scheme (arXiv 2408.14690: of each matrix, the columns of
the largest inputs), on this project's kernels; a loop over widths. Cases run in order of importance for at most
``--minutes``; what was left out is said. ``--smoke`` runs tiny cases without a clock, in Triton's interpreter
(``TRITON_INTERPRET=1``) on a CPU.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from kernel_timing import Call, ceilings, eager, in_graph
from torch import Tensor
from torch.nn.functional import linear, silu

from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Choice, Prefix, Subset
from dynaconv.kernels.codes import Codes, bytes_a_row
from dynaconv.kernels.partition import Partition
from dynaconv.kernels.reference import blocked_ffn, hidden_neurons
from dynaconv.kernels.sketched import Asked, SketchedFFN
from dynaconv.kernels.triton_blocks import TRITON, staircase_ffn
from dynaconv.kernels.triton_decode import down_and_sum, plan
from dynaconv.kernels.triton_sketched import TRITON_SKETCHED
from dynaconv.kernels.weights import FFNWeights

SHAPES = {"8b": (4096, 14336), "1b": (2048, 8192), "small": (1024, 3072)}
DECODE, MANY = (1, 2, 4, 8, 16), (64, 256, 2048, 8192)
SHARES, GRAINS = (0.125, 0.25, 0.5, 0.75, 1.0), (1, 4, 16, 64)
TOLERANCE = 1e-2
COARSE, BITS, PLANES = 2, 3, 4  # as recipes have it


@dataclass
class Network:
    """Layers of one shape, with inputs for the largest batch."""

    weights: list[FFNWeights]
    x: Tensor
    sketches: list[SketchedFFN]

    @classmethod
    def random(cls, shape: tuple[int, int], largest: int, device: torch.device, layers: int) -> Network:
        """bf16 weights with down transposed in memory, and inputs of unit variance."""
        columns, neurons = shape
        torch.manual_seed(0)

        def values(rows: int, row: int, scale: float) -> Tensor:
            return (torch.randn(rows, row, device=device) * scale).bfloat16()

        weights = [
            FFNWeights(
                values(neurons, columns, columns**-0.5),
                values(neurons, columns, columns**-0.5),
                values(neurons, columns, neurons**-0.5).t(),
                silu,
            )
            for _ in range(layers)
        ]
        return cls(weights, values(largest, columns, 1.0), [_sketch(one) for one in weights])


def _sketch(weights: FFNWeights) -> SketchedFFN:
    assert weights.gate is not None
    parts = (weights.gate, weights.up, weights.down.t())
    gate, up, down = (Codes.of(part, PLANES) for part in parts)
    norms = weights.down.float().norm(dim=0)
    looked = norms * (2 / torch.pi) ** 0.5 * weights.up.shape[1] ** -0.5  # |up x| / ||x|| of random weights
    return SketchedFFN(weights, gate, up, down, norms, looked, 0.7, COARSE, BITS, "silu")


@dataclass
class Case:
    """One row of the table: what runs, and what it is checked against, for the first layer."""

    name: dict[str, Any]
    call: Call
    expected: Callable[[], Tensor] | None = None


def dense_cases(network: Network, count: int) -> Iterator[Case]:
    """The dense FFN in three forms, and compiled."""
    x, layers = network.x[:count], network.weights
    joined = [torch.cat([one.gate, one.up]) for one in layers if one.gate is not None]
    plain = [one._replace(down=one.down.contiguous()) for one in layers]

    def stock(one: FFNWeights, x: Tensor) -> Tensor:
        return linear(hidden_neurons(x, one), one.down)

    def fused(i: int) -> Tensor:
        gate, up = linear(x, joined[i]).chunk(2, dim=-1)
        return linear(silu(gate) * up, layers[i].down)

    compiled = torch.compile(stock, dynamic=False) if x.is_cuda else stock
    name = {"tokens": count, "share": 1.0}
    yield Case({**name, "kind": "dense", "form": "separate"}, lambda i: stock(plain[i], x))
    yield Case({**name, "kind": "dense", "form": "down transposed"}, lambda i: stock(layers[i], x))
    yield Case({**name, "kind": "dense", "form": "gate and up joined"}, fused)
    yield Case({**name, "kind": "dense", "form": "torch.compile"}, lambda i: compiled(plain[i], x))


def exact(network: Network, x: Tensor, choice: Choice, partition: Partition) -> Callable[[], Tensor]:
    """The first layer's reference in float32."""
    parts = (one.float() if isinstance(one, Tensor) else one for one in network.weights[0])
    weights = FFNWeights(*parts)  # type: ignore[arg-type]
    return lambda: blocked_ffn(BlockedFFN(weights, partition), x.float(), choice)


def sketched_cases(network: Network, count: int, share: float) -> Iterator[Case]:
    """Router and FFN in one, with exact values, and with a quarter of the neurons in use exact."""
    x, neurons = network.x[:count], network.weights[0].up.shape[0]
    sizes = _sizes(network.sketches[0], x)
    levels = [sizes.quantile(1 - part, dim=1) if part < 1 else sizes.new_zeros(count) for part in (share, share / 4)]
    for low in (False, True):
        asked = Asked(levels[0], levels[1] if low else None)

        def call(i: int, asked: Asked = asked) -> Tensor:
            return TRITON_SKETCHED.run(network.sketches[i], x, asked).output

        counts = TRITON_SKETCHED.run(network.sketches[0], x, asked).counts.float().mean(0) / neurons
        closer, on, whole = counts.tolist()
        name = {"kind": "sketch", "tokens": count, "share": share, "grain": 1, "low_bits": low}
        name |= {"bytes_share": _bytes_share(x.shape[1], closer, on, whole)}
        expected = None
        if not low and share == 1.0:  # at other shares, neurons at the threshold fall to either side by rounding
            everything = Subset(torch.ones(count, neurons, dtype=torch.bool, device=x.device))
            expected = exact(network, x, everything, Partition.equal(neurons, 1))
        yield Case(name, call, expected)


def _sizes(sketch: SketchedFFN, x: Tensor) -> Tensor:
    """What each neuron gives by the second look, (M, F) float32."""
    assert sketch.gate is not None
    gate, up = (linear(x, codes.values(sketch.bits, x.dtype)) for codes in (sketch.gate, sketch.up))
    return (silu(gate) * up).float().abs() * sketch.norms


def _bytes_share(columns: int, closer: float, on: float, whole: float) -> float:
    """Bytes that a token's own choice reads, over those of the dense FFN."""
    row = bytes_a_row(columns, COARSE) + closer * (
        bytes_a_row(columns, BITS - COARSE, further=True) + bytes_a_row(columns, BITS)
    )
    further = 2 * bytes_a_row(columns, PLANES - BITS, further=True) + bytes_a_row(columns, PLANES)
    return (row + (on - whole) * further + whole * 6 * columns) / (6 * columns)


def listed_cases(network: Network, count: int, share: float, grain: int) -> Iterator[Case]:
    """Blocks of ``grain`` neurons, given, each token its own."""
    x, neurons = network.x[:count], network.weights[0].up.shape[0]
    partition = Partition.equal(neurons, grain)
    choices = [Subset(torch.rand(count, partition.blocks, device=x.device) < share) for _ in network.weights]
    ffns = [BlockedFFN(one, partition) for one in network.weights]
    name = {"kind": "blocks", "tokens": count, "share": share, "grain": grain}
    yield Case(name, lambda i: TRITON.run(ffns[i], x, choices[i]), exact(network, x, choices[0], partition))


def nested_cases(network: Network, count: int, share: float) -> Iterator[Case]:
    """Eight nested blocks: one width for all, widths of all sizes, and the latter as a loop over widths."""
    x, neurons = network.x[:count], network.weights[0].up.shape[0]
    partition = Partition.equal(neurons, -(-neurons // 8))
    ffns = [BlockedFFN(one, partition) for one in network.weights]
    width = partition.width_within(share)
    one_width = Prefix(torch.full((count,), width, device=x.device))
    spread = torch.randint(0, min(8, 2 * width) + 1, (count,), generator=torch.Generator().manual_seed(0))
    for label, choice in (("one", one_width), ("mixed", Prefix(spread.to(x.device)))):
        name = {"kind": "nested", "tokens": count, "share": share, "widths": label}
        yield Case(
            name,
            lambda i, choice=choice: TRITON.run(ffns[i], x, choice),  # type: ignore[misc]
            exact(network, x, choice, partition),
        )
    if 1 < count <= 16:
        name = {"kind": "nested", "tokens": count, "share": share, "widths": "one", "form": "staircase"}
        yield Case(name, lambda i: staircase_ffn(ffns[i], x, one_width), exact(network, x, one_width, partition))
    rows = [(partition.edges[n], (spread == n).nonzero()[:, 0].to(x.device)) for n in range(1, 9)]

    def loop(i: int) -> Tensor:
        output, one = torch.zeros_like(x), ffns[i]
        for stop, index in rows:
            if len(index):
                output[index] = linear(one.neurons(x[index], 0, stop), one.columns(0, stop))
        return output

    name = {"kind": "loop over widths", "tokens": count, "share": share, "widths": "mixed"}
    yield Case(name, loop, exact(network, x, Prefix(spread.to(x.device)), partition))


def teal_cases(network: Network, share: float) -> Iterator[Case]:
    """TEAL's scheme for one token: each matrix reads the columns of its largest inputs only."""
    x, neurons = network.x[:1], network.weights[0].up.shape[0]
    gates = [one.gate.t().contiguous() for one in network.weights if one.gate is not None]
    rows = [(gate, one.up.t().contiguous(), one.down.t()) for gate, one in zip(gates, network.weights, strict=True)]

    def product(x: Tensor, matrix: Tensor) -> Tensor:
        """``x`` (1, A) times the rows (A, B) of its largest entries."""
        size = x.float().abs()
        kept = x.float() * (size >= size.kthvalue(max(1, round((1 - share) * size.shape[1]))).values)
        sizes = plan(1, matrix.shape[1], matrix.shape[0], 1)
        given = kept.new_zeros(1, 1, sizes.tile, sizes.tiles)
        given.view(-1)[: kept.shape[1]] = kept[0]
        given = given.transpose(2, 3).contiguous()  # row r lies in tile r % S, place r // S
        output = torch.empty(1, matrix.shape[1], dtype=torch.float32, device=x.device)
        down_and_sum(sizes, matrix, given, output, None)
        return output

    def call(i: int) -> Tensor:
        gate, up, down = rows[i]
        return product(silu(product(x, gate)) * product(x, up), down)

    expected = None
    if share == 1.0:
        every = Subset(torch.ones(1, neurons, dtype=torch.bool, device=x.device))
        expected = exact(network, x, every, Partition.equal(neurons, 1))
    yield Case({"kind": "TEAL's scheme", "tokens": 1, "share": share}, call, expected)


def cases(
    network: Network, decode: tuple[int, ...], many: tuple[int, ...], shares: tuple[float, ...], grains: tuple[int, ...]
) -> Iterator[Case]:
    """All cases of one shape, the most important first."""
    for count in (*decode, *many):
        yield from dense_cases(network, count)
    for share in shares:
        yield from sketched_cases(network, decode[0], share)
        yield from listed_cases(network, decode[0], share, 1)
        yield from teal_cases(network, share)
    for share in shares:
        for count in decode[1:]:
            yield from sketched_cases(network, count, share)
        for count in (*decode, *many):
            yield from nested_cases(network, count, share)
    for share in shares:
        for count in decode:
            for grain in grains[1:] if count == decode[0] else grains:
                yield from listed_cases(network, count, share, grain)


def measured(case: Case, layers: int, *, timed: bool) -> dict[str, Any]:
    """Error of the first layer, and times where there is a clock.

    Raises:
        RuntimeError: The result is wrong.
    """
    row = dict(case.name)
    found = case.call(0)
    if case.expected is not None:
        truth = case.expected()
        row["error"] = float((found.float() - truth).norm() / truth.norm().clamp_min(1e-6))
        if not row["error"] <= TOLERANCE:
            raise RuntimeError(f"{case.name}: relative error {row['error']:.2g}; at most {TOLERANCE} is rounding")
    elif not found.isfinite().all():
        raise RuntimeError(f"{case.name}: the result has values that are not finite")
    if timed:
        row |= in_graph(case.call, layers)
        row["eager_us"] = eager(case.call, layers)["median_us"]
    return row


def with_ratios(rows: list[dict[str, Any]]) -> None:
    """Adds ``speedup``, times as fast as the best dense form of the same shape and number of tokens."""
    best: dict[tuple[str, int], float] = {}
    for row in rows:
        if row["kind"] == "dense" and "median_us" in row:
            key = row["shape"], row["tokens"]
            best[key] = min(best.get(key, float("inf")), row["median_us"])
    for row in rows:
        if "median_us" in row and (row["shape"], row["tokens"]) in best:
            row["speedup"] = best[row["shape"], row["tokens"]] / row["median_us"]


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("kernels.json"),
    minutes: Annotated[float, typer.Option(help="Start no case after this many.")] = 9.0,
    shapes: Annotated[str, typer.Option(help="Of 8b, 1b, small; separated by commas.")] = "8b,1b,small",
    smoke: Annotated[bool, typer.Option(help="Tiny cases, checked and not timed, on a CPU.")] = False,
) -> None:
    """Measures, prints one line a case, and writes JSON."""
    began, timed = time.monotonic(), not smoke
    if timed and not torch.cuda.is_available():
        raise typer.BadParameter("no GPU is here; --smoke with TRITON_INTERPRET=1 checks results on a CPU")
    device = torch.device("cuda" if timed else "cpu")
    result: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "torch": torch.__version__}
    if timed:
        result |= {"device": torch.cuda.get_device_name(), "ceilings": ceilings(device)}
        print(result["device"], result["ceilings"], flush=True)
    rows: list[dict[str, Any]] = []
    skipped = 0
    for shape in shapes.split(",") if timed else ["smoke"]:
        size = SHAPES[shape] if timed else (40, 24)
        sets = (DECODE, MANY, SHARES, GRAINS) if timed else ((1, 2), (17,), (0.25, 1.0), (1, 4))
        layers = max(8, -(-(1 << 29) // (6 * size[0] * size[1]))) if timed else 1
        network = Network.random(size, max(*sets[0], *sets[1]), device, layers)
        with torch.no_grad():
            for case in cases(network, *sets):
                if time.monotonic() - began > 60 * minutes:
                    skipped += 1
                    continue
                row = {"shape": shape, **measured(case, layers, timed=timed)}
                rows.append(row)
                print(json.dumps(row), flush=True)
        del network
    with_ratios(rows)
    result |= {"rows": rows, "skipped": skipped}
    if skipped:
        print(f"{skipped} cases were left out after {minutes} minutes")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
