"""How fast a model generates at each dial, the dense parent beside it, and how near that comes to what memory allows.

At small batches a step of decoding waits for bytes, so a dial promises the ratio of the bytes that parent and dial read
for a step. What a machine can read is measured in the same run. Candidates take turns, and medians are kept, so that a
busy machine slows all of them alike. B sequences, T tokens of prompt.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation import BaseStreamer

from dynaconv.dynamic.cost import UnitCost
from dynaconv.dynamic.dial import Dial
from dynaconv.dynamic.ffn import DynamicFFN
from dynaconv.dynamic.policy import Decision
from dynaconv.dynamic.recorder import Record, Recorder, shares_of
from dynaconv.dynamic.routers.sketch import SketchRouter
from dynaconv.evaluation.cost import CostModel
from dynaconv.evaluation.speed import decoding
from dynaconv.kernels.choice import Choice, Prefix, Subset
from dynaconv.kernels.dispatch import decide, sketched_backend

BUFFER = 1 << 30
"""Bytes of what is read to measure the memory's bandwidth: several times as many as the largest caches hold."""
PARENT, MEMORY = "parent", "memory"
STOCK = "stock"
"""The parent's path."""


@dataclass(frozen=True)
class Sizes:
    """What is generated, and how often.

    Attributes:
        batch: Sequences generated together.
        prompt: Tokens of prompt of each, two or more.
        tokens: New tokens of each, two or more.
        rounds: Turns of each candidate, after one that is not counted.
    """

    batch: int = 1
    prompt: int = 32
    tokens: int = 64
    rounds: int = 5

    @property
    def context(self) -> int:
        """Mean tokens of context of a decoding step."""
        return self.prompt + self.tokens // 2

    def turns(self, dials: int) -> int:
        """Turns of all candidates, with so many dials: one more of each dial, in which is noted what it reads."""
        return dials + (self.rounds + 1) * (dials + 2)


@dataclass(frozen=True)
class Speed:
    """One candidate.

    Attributes:
        dial: Its budget; ``None`` for the parent.
        tokens_per_s: Tokens decoded a second, of all sequences together, the first token of each not counted.
        first_token_s: Seconds until the first token, in which the prompt is read.
        bytes_per_step: Bytes read for one step of decoding: one token of every sequence.
        ffn_bytes_share: Of these, what is read of the FFNs, routers included, as a share of the parent's FFN bytes.
        promised: Ratio of the parent's ``bytes_per_step`` to these.
        measured: Ratio of ``tokens_per_s`` to the parent's.
        bandwidth_share: Bytes read a second, as a share of what the memory can be read with.
        path: What computes the FFNs of a step.
        reason: Why, in one sentence; empty for the parent.
    """

    dial: float | None
    tokens_per_s: float
    first_token_s: float
    bytes_per_step: float
    ffn_bytes_share: float
    promised: float
    measured: float
    bandwidth_share: float
    path: str
    reason: str = ""


@dataclass(frozen=True)
class Speeds:
    """What one run measured.

    Attributes:
        bandwidth: Bytes a second that a plain sum over a large buffer reads, with the same threads.
        parent: Stock transformers with the same weights.
        dials: By ascending budget.
    """

    bandwidth: float
    parent: Speed
    dials: tuple[Speed, ...]


class Took(NamedTuple):
    """Seconds of one turn: until the first token, and for each of the others."""

    first: float
    step: float


class Clock(BaseStreamer):
    """Notes when ``generate`` hands out tokens: at first the prompt, then one a step, already on the CPU."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """See :class:`BaseStreamer`."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """See :class:`BaseStreamer`."""


class StepRecorder(Recorder):
    """Bytes that the FFNs of decoding steps read, and what computes them. The prompt is left out.

    Args:
        ffns: Of the model, in order.
        itemsize: Bytes of a weight as the model is held.

    Attributes:
        read: For each FFN of each step, the share of the parent's FFN bytes.
        path: See :class:`Speed`.
        reason: Likewise.
    """

    def __init__(self, ffns: Sequence[DynamicFFN], itemsize: int) -> None:
        super().__init__()
        self.ffns, self.cost = ffns, _cost_at(ffns[0], itemsize)
        self.read: list[float] = []
        self.path, self.reason = "", ""

    def record(self, record: Record) -> None:
        """See :meth:`Recorder.record`."""
        if record.x.dim() == 3 and record.x.shape[1] > 1:
            return
        if not self.path:
            self.path, self.reason = ffn_path(self.ffns[record.site.index], record.x, record.choice)
        if record.choice is None:
            self.read.append(1.0)
        elif isinstance(record.choice, (Prefix, Subset)):
            shares = [float(share) for share in shares_of(read_once(record.choice), record.site.partition)]
            self.read.append(self.cost.of(*shares))
        else:
            self.read.append(float(record.bytes_share().mean()))

    @property
    def share(self) -> float:
        """Mean over FFNs and steps."""
        return statistics.fmean(self.read)


def _cost_at(ffn: DynamicFFN, itemsize: int) -> UnitCost:
    """What a token's use of ``ffn`` costs in bytes where weights have ``itemsize`` bytes."""
    shallow = copy.copy(ffn)
    shallow.__dict__.pop("cost", None)
    shallow.itemsize = itemsize
    return shallow.cost.bytes


def read_once(choice: Prefix | Subset) -> Prefix | Subset:
    """What a step reads of ``choice`` over its tokens, each neuron once: a choice of one token."""
    if isinstance(choice, Prefix):
        return Prefix(choice.widths.max().view(1))
    rows = choice.rows()
    exact, closer = (None if one is None else one.any(0, keepdim=True) for one in (rows.exact, rows.closer))
    return Subset(rows.on.any(0, keepdim=True), exact, closer)


def ffn_path(ffn: DynamicFFN, x: Tensor, choice: Choice | None) -> tuple[str, str]:
    """What computes ``ffn`` for tokens ``x`` (B, T, D) that use ``choice``, and why, in one sentence."""
    if choice is None:
        return "dense", "every neuron is used: the FFNs are computed as in the parent"
    rows, router = x.reshape(-1, x.shape[-1]), ffn.router
    if isinstance(router, SketchRouter) and isinstance(choice, Subset) and ffn.is_plain():
        sketched = router.sketched(ffn.weights(), ffn.activation_name)
        fused = sketched_backend(sketched, rows)
        if fused is not None:
            return fused.name, fused.can_run(sketched, rows)[1]
    means = None if ffn.means is None else ffn.means.new_zeros(len(ffn.means))
    network = ffn.blocked(Decision(choice, means=means), x)
    chosen = decide(network, rows, choice.rows())
    variant = chosen.backend.variant(network, rows, choice.rows())
    return f"{chosen.backend.name}, {variant}" if variant else chosen.backend.name, chosen.reason


@torch.inference_mode()
def measure(
    parent: Any,
    model: Any,
    cost: CostModel,
    dials: Sequence[Dial],
    prompt: Tensor,
    sizes: Sizes,
    *,
    finished: Callable[[str], None] = lambda name: None,
) -> Speeds:
    """Lets ``parent``, and ``model`` at each of ``dials``, generate in turns.

    Args:
        parent: The stock model.
        model: The dynamic one.
        cost: Of the parent, at the dtype that it is held in, with as much context as there is on average.
        dials: Budgets that differ.
        prompt: (B, T) int64, T of two or more.
        sizes: How many tokens, and how often.
        finished: Called with the name of a candidate after each of its turns; see :meth:`Sizes.turns`.
    """
    runs = {MEMORY: _reading(prompt.device), PARENT: _generating(parent, prompt, sizes.tokens)}
    seen: dict[str, StepRecorder] = {}
    for dial in dials:
        runs[str(dial)] = _generating(model, prompt, sizes.tokens, dial=dial)
        seen[str(dial)] = StepRecorder(model.ffns(), cost.itemsize)
        with model.call.using(recorder=seen[str(dial)]):
            runs[str(dial)]()
        for ffn in model.ffns():
            if ffn.copy is not None:
                ffn.copy.release()  # what noting down took to compute, and generating does not
        finished(str(dial))
    taken = _in_turns(runs, sizes.rounds, finished)
    dense = Candidate(taken[PARENT], cost.bytes_per_step(1.0, len(prompt)), len(prompt))
    bandwidth = BUFFER / taken[MEMORY].step
    found = []
    for dial in dials:
        name, recorder = str(dial), seen[str(dial)]
        read = cost.bytes_per_step(recorder.share, len(prompt))
        speed = Candidate(taken[name], read, len(prompt)).against(dense, bandwidth)
        budget, share = dial.resolved(model.layout), recorder.share
        found.append(replace(speed, dial=budget, ffn_bytes_share=share, path=recorder.path, reason=recorder.reason))
    return Speeds(bandwidth, dense.against(dense, bandwidth), tuple(found))


class Candidate(NamedTuple):
    """Median seconds of one, and bytes that a step of it reads, for so many sequences together."""

    took: Took
    read: float
    sequences: int

    def against(self, dense: Candidate, bandwidth: float) -> Speed:
        """Its speed beside that of the parent, on a memory that can be read with ``bandwidth`` bytes a second."""
        return Speed(
            dial=None,
            tokens_per_s=self.sequences / self.took.step,
            first_token_s=self.took.first,
            bytes_per_step=self.read,
            ffn_bytes_share=1.0,
            promised=dense.read / self.read,
            measured=dense.took.step / self.took.step,
            bandwidth_share=self.read / self.took.step / bandwidth,
            path=STOCK,
        )


def _generating(model: Any, prompt: Tensor, tokens: int, **settings: Any) -> Callable[[], Took]:
    """A turn that generates ``tokens`` tokens after each sequence of ``prompt``."""

    def run() -> Took:
        clock = Clock()
        begun = time.perf_counter()
        decoding(model, prompt, tokens, streamer=clock, **settings)()
        _, first, *rest = clock.times  # the prompt comes first
        assert len(rest) == tokens - 1, "generation ended early"
        return Took(first - begun, (rest[-1] - first) / len(rest))

    return run


def _reading(device: torch.device) -> Callable[[], Took]:
    """A turn that reads a buffer."""
    buffer = torch.ones(BUFFER // 8, dtype=torch.int64, device=device)  # integers are added up the fastest

    def run() -> Took:
        begun = time.perf_counter()
        int(buffer.sum())  # waits for the device
        return Took(0.0, time.perf_counter() - begun)

    return run


def _in_turns(runs: Mapping[str, Callable[[], Took]], rounds: int, finished: Callable[[str], None]) -> dict[str, Took]:
    """Median of each candidate over ``rounds``, after one round that is not counted."""
    taken: dict[str, list[Took]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            took = run()
            if number:
                taken[name].append(took)
            finished(name)
    return {name: Took(*map(statistics.median, zip(*each, strict=True))) for name, each in taken.items()}
