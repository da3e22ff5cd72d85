"""How fast one dynamic FFN is on one CPU thread, against the dense one.

    python scripts/bench_cpu.py

First single neurons, chosen by sketches at thresholds that were solved for each share of the bytes: FFNs of published
shapes with random weights (or of a converted MODEL), on inputs that reach them in that model. Timed are the dense FFN,
what dynaconv runs, each sketched backend by itself, and router and reference one after the other. Then blocks
(``cpu_blocks.py``). Results are checked in the same run. Takes about twenty minutes; ``--effort 0.2`` less.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import cpu_blocks
import torch
import typer
from cpu_timing import check, medians, named, row_errors, times_text, verdict
from torch import Tensor
from torch.nn.functional import linear

from dynaconv.dynamic.dial import Dial
from dynaconv.dynamic.few_bits import FewBitCopy
from dynaconv.dynamic.ffn import DynamicFFN
from dynaconv.dynamic.policy import ByThreshold, Full, Policy
from dynaconv.dynamic.recorder import Record, Recorder, shares_of
from dynaconv.evaluation.bench import Sizes, ffn_path, read_once
from dynaconv.evaluation.bench_models import Subject, of_folder, of_shape
from dynaconv.evaluation.shapes import shape_config
from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Subset
from dynaconv.kernels.reference import blocked_ffn as reference_ffn
from dynaconv.kernels.reference import hidden_neurons
from dynaconv.kernels.sketched import Asked, SketchedBackend, SketchedFFN
from dynaconv.kernels.weights import FFNWeights

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REPETITIONS = {1: 40, 8: 20}
ROTATED = 400 << 20  # bytes of FFNs, at least, so that no cache holds what is timed
TOKENS = 64  # whose inputs are used in turn
OWN = "own"  # a batch in which each token has a dial of its own
# Rounding decides about neurons whose scores lie at the threshold: some that add little are on here and off there.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1}


@dataclass
class Row:
    """A case's time with each candidate, and how many times as long dense takes.

    Attributes:
        shape: Of the FFN.
        dtype: Of the weights.
        batch: Tokens, each with neurons of its own.
        dial: Budget, or ``own`` where tokens have different ones.
        bytes_share: What a token reads, as a share of the FFN's bytes, on average.
        read_share: What the batch reads, each neuron once.
        active_share: Neurons that a token uses.
        path: What dynaconv runs.
        milliseconds: By candidate, of CPU time.
        wall_milliseconds: By candidate.
        speedup: By candidate.
        relative_error: By candidate, against the reference in fp32.
    """

    shape: str
    dtype: str
    batch: int
    dial: str
    bytes_share: float
    read_share: float
    active_share: float
    path: str
    milliseconds: dict[str, float]
    wall_milliseconds: dict[str, float]
    speedup: dict[str, float]
    relative_error: dict[str, float]


class Inputs(Recorder):
    """Keeps what goes into each FFN, ``(tokens, D)`` by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.x: dict[int, Tensor] = {}

    def record(self, record: Record) -> None:
        """See :meth:`Recorder.record`."""
        self.x[record.site.index] = record.x.flatten(0, -2).clone()


class Bench:
    """FFNs of one model, one a layer.

    Args:
        name: Of its shape.
        subject: The model.
        backends: Sketched ones, to be timed by themselves.
    """

    def __init__(self, name: str, subject: Subject, backends: Sequence[SketchedBackend]) -> None:
        self.name, self.model, self.backends = name, subject.model, backends
        self.ffns: list[DynamicFFN] = subject.model.ffns()
        recorder = Inputs()
        with self.model.call.using(Full(), recorder):
            self.model(subject.prompt, use_cache=False, logits_to_keep=1)
        self.inputs = [recorder.x[layer] for layer in range(len(self.ffns))]
        self.sketch_routers: list[Any] = [ffn.router for ffn in self.ffns]
        first = self.ffns[0]
        parts = [part.float() if isinstance(part, Tensor) else part for part in first.weights()]
        self.exact, self.exact_router = FFNWeights(*parts), copy.deepcopy(self.sketch_routers[0])  # type: ignore[arg-type]
        few_bits = FewBitCopy(self.model.layout.copy, first.copy.bits, first.copy.coarse)
        few_bits.follow(self.exact)
        self.exact_router.follow(few_bits, self.exact)
        self.sketched: list[SketchedFFN] = []
        if backends:
            pairs = zip(self.sketch_routers, self.ffns, strict=True)
            self.sketched = [router.sketched(ffn.weights(), ffn.activation_name) for router, ffn in pairs]

    def x(self, layer: int, batch: int) -> Tensor:
        """Inputs ``(B, 1, D)`` of a decoding step."""
        return self.inputs[layer][-batch:, None]

    def dense(self, layer: int, batch: int) -> Tensor:
        """All neurons for all tokens, as transformers computes them."""
        weights = self.ffns[layer].weights()
        return linear(hidden_neurons(self.x(layer, batch), weights), weights.down)

    def dynamic(self, layer: int, batch: int, policy: Policy) -> Tensor:
        """What dynaconv runs."""
        with self.model.call.using(policy):
            return self.ffns[layer](self.x(layer, batch))

    def reference(self, layer: int, batch: int, policy: Policy) -> Tensor:
        """The router, then the reference, which computes every tier of every neuron."""
        ffn, x = self.ffns[layer], self.x(layer, batch)
        decision = policy.decide(ffn.site, ffn.router, x)
        assert decision.choice is not None
        return reference_ffn(ffn.blocked(decision, x), x.flatten(0, 1), decision.choice.rows())

    def truth(self, batch: int, policy: Policy) -> Tensor:
        """The output ``(B, D)`` of the first layer, router and reference in fp32."""
        ffn, x = self.ffns[0], self.x(0, batch).float()
        if not isinstance(policy, ByThreshold):
            return linear(hidden_neurons(x.flatten(0, 1), self.exact), self.exact.down)
        choice = policy.decide(ffn.site, self.exact_router, x).choice
        mean = None if policy.means is None or ffn.means is None else policy.means @ ffn.means
        assert choice is not None
        low = self.exact_router.copy.low(self.exact)
        return reference_ffn(BlockedFFN(self.exact, ffn.site.partition, low, mean), x.flatten(0, 1), choice.rows())

    def by(self, backend: SketchedBackend, layer: int, batch: int, asked: Sequence[Asked]) -> Tensor:
        """A sketched backend."""
        return backend.run(self.sketched[layer], self.x(layer, batch).flatten(0, 1), asked[layer]).output

    def asked(self, layer: int, batch: int, policy: ByThreshold) -> Asked:
        """What ``policy`` asks of a sketched backend."""
        ffn, router = self.ffns[layer], self.sketch_routers[layer]
        thresholds = (policy.thresholds, policy.exact)
        levels = [None if one is None else router.level(one[..., layer]).expand(batch) for one in thresholds]
        means: list[Tensor] = []
        if policy.means is not None and ffn.means is not None:
            mean, down = policy.means @ ffn.means, ffn.weights().down
            means = [mean, linear(mean.to(down.dtype), down).float()]
        given: list[Any] = [*levels, *means]
        return Asked(*given)

    def candidates(self, batch: int, policy: Policy) -> dict[str, Callable[[int], Tensor]]:
        """Everything that is timed, each for a layer."""
        found: dict[str, Callable[[int], Tensor]] = {
            "dense": lambda layer: self.dense(layer, batch),
            "dynamic": lambda layer: self.dynamic(layer, batch, policy),
        }
        if not isinstance(policy, ByThreshold):
            return found
        asked = [self.asked(layer, batch, policy) for layer in range(len(self.sketched))]
        for backend in self.backends:
            able, why = backend.can_run(self.sketched[0], self.x(0, batch).flatten(0, 1))
            if able:
                found[backend.name] = lambda layer, backend=backend: self.by(backend, layer, batch, asked)  # type: ignore[misc]
            else:
                say_once(f"{backend.name} is not timed at batch {batch}: {why}")
        return {**found, "reference": lambda layer: self.reference(layer, batch, policy)}

    def measure(self, batch: int, dial: str, policy: Policy, repetitions: int) -> Row:
        """Times one case."""
        candidates, layers = self.candidates(batch, policy), range(len(self.ffns))
        times = medians(candidates, len(layers), repetitions)
        cpu, wall = (1e3 * torch.tensor(each, dtype=torch.float64) for each in times)
        dtype, expected = self.inputs[0].dtype, self.truth(batch, policy)
        ours = {name: run(0).view(batch, -1) for name, run in candidates.items() if name != "dense"}
        errors = {name: row_errors(found, expected) for name, found in ours.items()}
        for name, error in errors.items():
            check(error, TOLERANCE[dtype], f"{self.name}, {dtype}, batch {batch}, dial {dial}, {name}")
        shares = [self._shares(layer, batch, policy) for layer in layers]
        mean, once, active = (sum(each) / len(layers) for each in zip(*shares, strict=True))
        x = self.x(0, batch)
        return Row(
            shape=self.name,
            dtype=str(dtype).removeprefix("torch."),
            batch=batch,
            dial=dial,
            bytes_share=round(mean, 4),
            read_share=round(once, 4),
            active_share=round(active, 4),
            path=ffn_path(self.ffns[0], x, policy.decide(self.ffns[0].site, self.ffns[0].router, x).choice)[0],
            milliseconds=named(candidates, cpu),
            wall_milliseconds=named(candidates, wall),
            speedup=named(candidates, cpu[0] / cpu),
            relative_error=errors,
        )

    def _shares(self, layer: int, batch: int, policy: Policy) -> tuple[float, float, float]:
        """Shares of the bytes that a token reads on average, and the batch; and of the neurons that a token uses."""
        ffn = self.ffns[layer]
        choice = policy.decide(ffn.site, ffn.router, self.x(layer, batch)).choice
        if choice is None:
            return 1.0, 1.0, 1.0
        assert isinstance(choice, Subset)
        each, once = (shares_of(one, ffn.site.partition) for one in (choice, read_once(choice)))
        cost = ffn.cost.bytes
        return float(cost.of(*each).mean()), float(cost.of(*once)), float(each[0].mean())


def layers_for(shape: str, dtype: torch.dtype) -> int:
    """Enough layers of ``shape`` that no cache holds their FFNs."""
    config = shape_config(shape)
    one = 3 * config["hidden_size"] * config["intermediate_size"] * dtype.itemsize
    return min(config["num_hidden_layers"], max(2, math.ceil(ROTATED / one)))


def measured(bench: Bench, budgets: Sequence[float], batches: Mapping[int, int]) -> Iterator[Row]:
    """Every case of one model: each budget, the full dial, and for batches a dial for each token."""
    for batch, repetitions in batches.items():
        for budget in (*budgets, 1.0):
            yield bench.measure(batch, f"{budget:g}", bench.model.policy(Dial(budget=budget)), repetitions)
        if batch > 1 and len(budgets) > 1:
            own = [Dial(budget=budgets[i % len(budgets)]) for i in range(batch)]
            yield bench.measure(batch, OWN, bench.model.policy(own), repetitions)


def targets(rows: Sequence[Row], candidate: str) -> list[dict[str, Any]]:
    """What the project promises of single neurons, and whether ``candidate`` keeps it."""
    checks = []
    for row in rows:
        if candidate not in row.speedup:
            continue
        case, speedup = f"{row.shape}, {row.dtype}, batch {row.batch}, dial {row.dial}", row.speedup[candidate]
        checks.append(verdict(case, "at least .97 of dense", 0.97, speedup))
        if row.batch == 1 and row.dial != "1":
            checks.append(verdict(case, "at least .8 of 1/bytes", 0.8 / row.bytes_share, speedup))
        if row.batch == 8 and row.dial == "0.25":
            checks.append(verdict(case, "at least 1.5x dense", 1.5, speedup))
    return checks


def show(row: Row) -> None:
    """Prints one line of the table."""
    case = f"{row.shape} {row.dtype:8} batch {row.batch} dial {row.dial:4} reads {row.bytes_share:.3f}"
    print(case, times_text(row.milliseconds, row.speedup), flush=True)


@functools.cache
def say_once(line: str) -> None:
    """Prints ``line``, once."""
    print(line)


def environment() -> dict[str, Any]:
    """What the numbers were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "cpu": names[0] if names else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load": [round(value, 2) for value in os.getloadavg()],  # processes that wanted a core, over 1, 5, 15 minutes
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _named_objects(text: str) -> list[Any]:
    """What ``module:NAME,module:NAME`` names."""
    pairs = [one.split(":") for one in text.split(",") if one]
    return [getattr(importlib.import_module(module), name) for module, name in pairs]


def main(
    model: Annotated[Path | None, typer.Argument(help="A converted model, instead of shapes.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("benchmarks/cpu.json"),
    shapes: Annotated[str, typer.Option(help="Shapes, with commas; empty for none.")] = "llama-1b,qwen3-0.6b,llama-8b",
    dtypes: Annotated[str, typer.Option(help="fp32, bf16, with commas.")] = "fp32,bf16",
    shares: Annotated[str, typer.Option(help="Shares of the bytes, with commas.")] = "0.15,0.25,0.35,0.5",
    backends: Annotated[
        str, typer.Option(help="Sketched backends to time by themselves, as module:NAME.")
    ] = "dynaconv.kernels.cpu_sketched:CPU_SKETCHED",
    layers: Annotated[
        int | None, typer.Option(help="Layers to rotate over; enough for the caches, unless given.")
    ] = None,
    blocks: Annotated[bool, typer.Option(help="Also nested and routed blocks.")] = True,
    effort: Annotated[float, typer.Option(help="Multiplies the number of repetitions.")] = 1.0,
    seed: int = 0,
) -> None:
    """Times the dynamic FFN against the dense one on one CPU thread."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    budgets, chosen = sorted(float(one) for one in shares.split(",") if one), _named_objects(backends)
    batches = {batch: max(3, round(effort * count)) for batch, count in REPETITIONS.items()}
    rows: list[Row] = []
    block_rows: list[cpu_blocks.Row] = []
    sizes = Sizes(prompt=TOKENS)

    def add(name: str, subject: Subject) -> None:
        with torch.inference_mode():
            lowest = subject.model.layout.dial.budgets[0]
            within = [budget for budget in budgets if budget >= lowest]
            for row in measured(Bench(name, subject, chosen), within, batches):
                show(row)
                rows.append(row)

    for dtype in (DTYPES[name] for name in dtypes.split(",")):
        if model is not None:
            add(model.name, of_folder(model, sizes, CPU, dtype=dtype))
            continue
        for shape in filter(None, shapes.split(",")):
            config = shape_config(shape, layers=layers or layers_for(shape, dtype), vocab=1024)
            add(shape, of_shape(config, budgets, sizes, CPU, dtype))
    if blocks and model is None:
        with torch.inference_mode():
            for block_row in cpu_blocks.rows(layers or 4, effort, seed):
                cpu_blocks.show(block_row)
                block_rows.append(block_row)
    checks = {name: targets(rows, name) for name in ("dynamic", *(backend.name for backend in chosen))}
    checks["blocks"] = cpu_blocks.targets(block_rows, "dynamic")
    checks["blocks, with router"] = cpu_blocks.targets(block_rows, "with_router")
    for name, each in checks.items():
        for one in each:
            said = "pass" if one["pass"] else "FAIL"
            print(f"{said}  {name}: {one['case']}: {one['speedup']}x, {one['target']} ({one['goal']})")
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "environment": environment(),
        "neurons": [asdict(row) for row in rows],
        "blocks": [asdict(row) for row in block_rows],
        "targets": checks,
    }
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
