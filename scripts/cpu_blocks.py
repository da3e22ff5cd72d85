"""Blocks of neurons on a CPU against the dense FFN: nested, and routed of several sizes. A part of ``bench_cpu.py``.

A case is several draws of what tokens use: each candidate's time is the median over repetitions of one draw, averaged
over the draws. Tokens of routed experts use random blocks, which is the worst case: real tokens agree on some.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cpu_timing import TOLERANCE, check, medians, named, row_errors, times_text, verdict
from torch import Tensor
from torch.nn.functional import linear, silu

from dynaconv.dynamic.layout import RouterLayout
from dynaconv.dynamic.routers.base import Router
from dynaconv.dynamic.routers.kinds import KINDS
from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Choice, Prefix, Subset
from dynaconv.kernels.cpu_nested import prefix_ffn
from dynaconv.kernels.dispatch import blocked_ffn, decide
from dynaconv.kernels.partition import Partition
from dynaconv.kernels.reference import blocked_ffn as reference_ffn
from dynaconv.kernels.reference import hidden_neurons
from dynaconv.kernels.weights import FFNWeights

ONE_WIDTH_SHARES = (0.25, 0.5, 0.75, 1.0)
MIXED = {8: (48, 4), 64: (8, 5), 256: (4, 4)}  # batch: draws of widths, repetitions of each
ONE_WIDTH_REPETITIONS = 60
ROUTED_SHARES = (0.25, 0.5, 0.75)
ROUTED_BATCHES = {1: 40, 8: 20, 64: 10, 256: 6}  # batch: repetitions
WIDTH, NEURONS, NESTED, ROUTED = 2048, 8192, 1024, (16, 128)  # D, F, neurons a block


@dataclass
class Bench:
    """What is timed on: random networks of one shape and dtype, one a layer, each with a router in front."""

    ffns: list[BlockedFFN]
    routers: list[Router]

    @classmethod
    def of(cls, weights: list[FFNWeights], block_size: int, kind: str) -> Bench:
        """``weights`` in blocks of ``block_size`` neurons, with routers of ``kind``."""
        neurons, wide = weights[0].up.shape
        partition = Partition.equal(neurons, block_size)
        layout = RouterLayout(kind, linear=kind == "linear", rank=64 * -(-wide // 1024) if kind == "linear" else 64)
        routers = [KINDS[kind](wide, partition, layout).to(weights[0].up.dtype) for _ in weights]
        return cls([BlockedFFN(one, partition) for one in weights], routers)

    @property
    def partition(self) -> Partition:
        """How every network is cut."""
        return self.ffns[0].partition

    def candidates(self, case: Case, x: Tensor, choice: Choice) -> Mapping[str, Callable[[int], Tensor]]:
        """What is timed of ``case``, each for a layer."""
        return {name: partial(getattr(self, name), x=x, choice=choice) for name in case.candidates}

    def dense(self, layer: int, x: Tensor, choice: Choice) -> Tensor:
        """All neurons for all tokens, as transformers computes them."""
        weights = self.ffns[layer].weights
        return linear(hidden_neurons(x, weights), weights.down)

    def dynamic(self, layer: int, x: Tensor, choice: Choice) -> Tensor:
        """What dynaconv runs."""
        return blocked_ffn(self.ffns[layer], x, choice)

    def with_router(self, layer: int, x: Tensor, choice: Choice) -> Tensor:
        """The same with the cost of a router, whose answer is then not used."""
        router = self.routers[layer]
        router.choose(router(x), 0.0)
        return blocked_ffn(self.ffns[layer], x, choice)

    def per_width(self, layer: int, x: Tensor, choice: Choice) -> Tensor:
        """The loop over the widths that occur: gather the tokens, compute, scatter."""
        assert isinstance(choice, Prefix)
        out = torch.empty_like(x)
        for width in sorted(set(choice.widths.tolist())):
            rows = (choice.widths == width).nonzero().squeeze(1)
            out[rows] = prefix_ffn(self.ffns[layer], x[rows], width)
        return out


@dataclass
class Case:
    """A line of the table: what tokens use, in several draws."""

    mix: str
    draws: list[Choice]
    repetitions: int
    candidates: tuple[str, ...] = ("dense", "dynamic", "with_router")


@dataclass
class Row:
    """A case's time with each candidate, and how many times as long dense takes."""

    dtype: str
    experts: str
    block_size: int
    batch: int
    mix: str
    active_share: float
    kernel: str
    milliseconds: dict[str, float]
    wall_milliseconds: dict[str, float]
    speedup: dict[str, float]
    relative_error: float


def random_weights(wide: int, neurons: int, layers: int, dtype: torch.dtype) -> list[FFNWeights]:
    """Networks with weights of the size found in real models."""

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, dtype=dtype) * 0.02

    return [FFNWeights(draw(neurons, wide), draw(neurons, wide), draw(wide, neurons), silu) for _ in range(layers)]


def nested_cases(blocks: int, seed: int) -> Iterator[Case]:
    """The same for every dtype: one token of each share, then batches of uniformly random widths 0..N.

    And the worst of these for nested blocks: few tokens of which one uses everything, so that every weight is read.
    """
    generator = torch.Generator().manual_seed(seed)
    for share in ONE_WIDTH_SHARES:
        yield Case("one width", [Prefix(torch.tensor([round(share * blocks)]))], ONE_WIDTH_REPETITIONS)
    for batch, (draws, repetitions) in MIXED.items():
        widths = torch.randint(0, blocks + 1, (draws, batch), generator=generator)
        candidates = ("dense", "dynamic", "with_router", "per_width")
        yield Case("mixed", [Prefix(one) for one in widths], repetitions, candidates)
        if batch == min(MIXED):
            worst = widths.clone()
            worst[:, 0] = blocks
            yield Case("one full", [Prefix(one) for one in worst], repetitions, candidates)


def routed_cases(blocks: int, seed: int) -> Iterator[Case]:
    """Tokens that use so many random blocks each."""
    generator = torch.Generator().manual_seed(seed)
    for batch, repetitions in ROUTED_BATCHES.items():
        for share in ROUTED_SHARES:
            order = torch.rand(batch, blocks, generator=generator).argsort(dim=1)[:, : round(share * blocks)]
            on = torch.zeros(batch, blocks, dtype=torch.bool).scatter(1, order, True)
            yield Case("random", [Subset(on)], repetitions)


def measure(bench: Bench, case: Case) -> Row:
    """Times the case's candidates on each of its draws."""
    ffn = bench.ffns[0]
    wide, dtype = ffn.weights.up.shape[1], ffn.weights.up.dtype
    cpu, wall = torch.zeros(len(case.candidates)), torch.zeros(len(case.candidates))
    shares = []
    for choice in case.draws:
        shares.append(choice.active_share(ffn.partition))
        x = torch.randn(len(shares[-1]), wide, dtype=dtype)
        times = medians(bench.candidates(case, x, choice), len(bench.ffns), case.repetitions)
        cpu += torch.tensor(times.cpu) * 1e3 / len(case.draws)
        wall += torch.tensor(times.wall) * 1e3 / len(case.draws)
    return Row(
        dtype=str(dtype).removeprefix("torch."),
        experts="routed" if isinstance(choice, Subset) else "nested",
        block_size=ffn.partition.block_size,
        batch=len(x),
        mix=case.mix,
        active_share=round(torch.stack(shares).mean().item(), 4),
        kernel=decide(ffn, x, choice).backend.variant(ffn, x, choice),
        milliseconds=named(case.candidates, cpu),
        wall_milliseconds=named(case.candidates, wall),
        speedup=named(case.candidates, cpu[case.candidates.index("dense")] / cpu),
        relative_error=relative_error(bench, x, choice),
    )


def relative_error(bench: Bench, x: Tensor, choice: Choice) -> float:
    """Largest relative error of a row, against the reference in fp32."""
    ffn = bench.ffns[0]
    exact = FFNWeights(*(part.float() if isinstance(part, Tensor) else part for part in ffn.weights))  # type: ignore[arg-type]
    expected = reference_ffn(BlockedFFN(exact, ffn.partition), x.float(), choice)
    error = row_errors(bench.dynamic(0, x, choice), expected)
    check(error, TOLERANCE[x.dtype], f"{x.dtype}, batch {len(x)}")
    return error


def rows(layers: int, effort: float, seed: int) -> Iterator[Row]:
    """Every case, as it is measured."""
    for dtype in (torch.float32, torch.bfloat16):
        weights = random_weights(WIDTH, NEURONS, layers, dtype)
        for kind, size in (("width", NESTED), *(("linear", size) for size in ROUTED)):
            bench = Bench.of(weights, size, kind)
            for case in (nested_cases if kind == "width" else routed_cases)(bench.partition.blocks, seed):
                case.repetitions = max(3, round(effort * case.repetitions))
                yield measure(bench, case)


def targets(rows: list[Row], candidate: str) -> list[dict[str, Any]]:
    """What the project promises of nested blocks, and whether ``candidate`` keeps it."""
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
        checks.append(verdict(case, text, goal, row.speedup[candidate]))
    return checks


def show(row: Row) -> None:
    """Prints one line of the table."""
    blocks = f"{row.experts} {row.block_size:4}"
    begin = f"{row.dtype:8} {blocks} batch {row.batch:3} {row.mix:9} share {row.active_share:.2f}  {row.kernel:9}"
    print(begin, times_text(row.milliseconds, row.speedup))
