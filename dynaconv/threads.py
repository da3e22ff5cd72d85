"""How many CPU threads torch computes with: those that are fastest right now, found by measuring.

On free cores more threads are faster, as far as the matrices are large enough to share. Where other programs use the
cores, all threads wait at the end of every operation for the one that is not running, and two can be ten times slower
than one. Neither shows in the number of cores, so a little work shaped like the model's is timed with 1, 2, 4, ...
threads, as many as the load average of the last minute leaves cores free: half a second may be a quiet one.
``OMP_NUM_THREADS`` or ``MKL_NUM_THREADS`` in the environment settle the number without measuring.

Sums over whole tensors are split by threads, so another number of threads can change the last bits of a result.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Rounds a thread of GNU OpenMP spins at a barrier before it sleeps: some 30 us. By default it is 300,000, which keeps
# a core from the very thread that is waited for: training the embedded base with two threads on two busy cores fell to
# 64 tokens/s, and makes 2,000 to 3,400 with this; on free cores the speed is the same.
SPINS = "2000"
CGROUP = Path("/sys/fs/cgroup")
IMPORTED = time.monotonic()  # about when this process began
ROUNDS, TRIAL_SECONDS = 8, 0.02
GAIN = 1.1  # more threads must be so much faster to be worth the cores they take
HOPELESS = 3.0  # what is so much slower than the fastest is not timed again
LARGEST_WIDTHS, LARGEST_FLOPS = (512, 2048), 5e8  # of what is timed: about 0.01 s with one thread


@dataclass(frozen=True)
class Work:
    """Sizes of the matrices that will be computed with; the defaults are the embedded base's in training.

    Attributes:
        tokens: Tokens computed together.
        hidden: Residual width.
        ffn: FFN neurons.
    """

    tokens: int = 1024
    hidden: int = 128
    ffn: int = 384


@dataclass(frozen=True)
class ThreadCount:
    """A number of threads.

    Attributes:
        count: How many; ``None`` leaves torch as the user has set it.
        reason: One short line for the user; empty where there is nothing to say.
    """

    count: int | None
    reason: str = ""


def limit_spinning() -> None:
    """Keeps waiting threads from holding cores that others need. Only before torch is imported does it help."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def given() -> int | None:
    """The number of threads that the environment settles; ``None`` where it says nothing that can be understood."""
    for name in SETTINGS:
        first = os.environ.get(name, "").partition(",")[0].strip()  # OpenMP takes a list, one number a nesting depth
        if first.isdecimal() and int(first) > 0:
            return int(first)
    return None


def usable_cores() -> int:
    """Cores that this process may use: those it is bound to, and no more than its control group's quota pays for."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _quota()
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def others_load() -> float:
    """Threads of other processes that ran or wanted to run, on average over the last minute; 0 where unknown."""
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0
    own = time.process_time() / max(60.0, time.monotonic() - IMPORTED)
    return max(0.0, load - own)


def candidates(cores: int) -> list[int]:
    """1, 2, 4, ... and ``cores`` itself."""
    return sorted({1 << power for power in range(cores.bit_length()) if 1 << power <= cores} | {cores})


def choose(
    work: Callable[[], Work] = Work,
    *,
    ranks: int = 1,
    before: int | None = None,
    seconds: Callable[[int], float] | None = None,
) -> ThreadCount:
    """The number of threads for the work that comes now.

    Args:
        work: Says what it looks like; called only where something has to be measured.
        ranks: Processes that share this machine's cores.
        before: Number with which this work was begun by an earlier process: kept, so that the result stays the same
            to the bit, as long as there are as many cores.
        seconds: Seconds that a fixed piece of work takes with so many threads; the real thing unless a test knows.
    """
    if given() is not None:
        return ThreadCount(None)
    cores = max(1, usable_cores() // ranks)
    if before is not None and before <= cores:
        return ThreadCount(before, f"{_words(before)}: as this was begun")
    busy = others_load()
    counts = candidates(max(1, min(cores, round((os.cpu_count() or 1) - busy))))
    if len(counts) == 1:
        return ThreadCount(1, f"{_words(1)}: other programs want {busy:.1f} cores" if cores > 1 else "")
    return fastest(measure(counts, seconds or _timer(work())))


def measure(counts: Sequence[int], seconds: Callable[[int], float]) -> dict[int, float]:
    """Mean of ``seconds(count)`` for each count.

    The counts take turns, so that a busy moment strikes all of them, but what is hopeless gets no further turn. The
    mean decides and not the least: where threads wait for each other, the time is lost in a few long waits.
    """
    taken: dict[int, list[float]] = {count: [] for count in counts}
    means: dict[int, float] = {}
    for _ in range(ROUNDS):
        limit = HOPELESS * min(means.values(), default=math.inf)
        for count in counts:
            if means.get(count, 0.0) <= limit:
                taken[count].append(seconds(count))
        means = {count: sum(each) / len(each) for count, each in taken.items()}
    return means


def fastest(means: dict[int, float]) -> ThreadCount:
    """The fewest threads that are as good as the fastest, and a line that says so.

    Args:
        means: Seconds by number of threads, of 1 and at least one more.
    """
    count = min(each for each, mean in means.items() if mean <= GAIN * min(means.values()))
    other = 1 if count > 1 else min(set(means) - {1}, key=lambda each: means[each])
    ratio = means[other] / means[count]
    compared = f"{ratio:.1f} times as fast as {other}" if ratio > GAIN else f"{other} are no faster"
    return ThreadCount(count, f"{_words(count)}: {compared} just now")


@contextmanager
def using(count: int | None) -> Iterator[None]:
    """Torch computes with ``count`` threads for the block; ``None`` leaves it alone."""
    if count is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _words(count: int) -> str:
    return f"{count} CPU thread{'s' * (count > 1)}"


def _timer(work: Work) -> Callable[[int], float]:
    """Mean seconds of one pass through an FFN as large as that of ``work``, or as what can be timed quickly."""
    import torch

    hidden, ffn = (min(pair) for pair in zip((work.hidden, work.ffn), LARGEST_WIDTHS, strict=True))
    tokens = max(1, min(work.tokens, int(LARGEST_FLOPS / (4 * hidden * ffn))))
    x, up, down = (torch.full(size, 0.01) for size in ((tokens, hidden), (hidden, ffn), (ffn, hidden)))

    def run() -> None:
        (torch.nn.functional.silu(x @ up) @ down + x).softmax(-1).sum(-1)

    def seconds(count: int) -> float:
        with using(count), torch.inference_mode():
            run()  # starts the threads
            passes, started = 0, time.perf_counter()
            while not passes or time.perf_counter() - started < TRIAL_SECONDS:
                run()
                passes += 1
            return (time.perf_counter() - started) / passes

    return seconds


def _quota() -> float | None:
    """Cores that the control group of this container or service may use on average; ``None`` without a limit."""
    try:
        limit, period = (CGROUP / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            limit, period = ((CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return None
    return float(limit) / float(period) if limit.strip() not in ("max", "-1") else None
