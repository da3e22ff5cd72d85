"""What stops a run, and how it stops: a loss that explodes, memory that runs out, a signal to end.

In each case the last saved state stays as it is, and the message says what to change.
"""

from __future__ import annotations

import math
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

import torch

from dynaconv.config import RunConfig
from dynaconv.errors import ConfigError, QualityError

MEAN_OVER = 50  # steps
FEWEST = 10  # steps before a mean says anything


class Watch:
    """Stops at a loss that is no number, or far above the mean of the last steps.

    Args:
        explosion: How far above, in nats.
        losses: Those of the steps so far, where the run goes on from a saved state.
    """

    def __init__(self, explosion: float = math.inf, losses: Iterable[float] = ()) -> None:
        self.explosion = explosion
        self._last: deque[float] = deque(losses, maxlen=MEAN_OVER)

    def check(self, metrics: Mapping[str, float], where: str, batch: str) -> None:
        """Looks at one step's metrics before its gradients are used.

        Args:
            metrics: By name.
            where: Names the step.
            batch: Names what it was trained on.

        Raises:
            QualityError: The loss exploded.
        """
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        loss = watched(metrics)
        mean = math.fsum(self._last) / len(self._last) if len(self._last) >= FEWEST else math.inf
        if bad or loss > mean + self.explosion:
            what = f"{bad[0]} is no longer a number" if bad else f"the loss exploded: {loss:.2f} after {mean:.2f}"
            hint = "lower finetune.learning_rate, raise finetune.warmup_steps, or look at that text"
            hint += "" if bad else "; with a higher finetune.explosion the run goes on from the last saved state"
            raise QualityError(what, where=where, found=batch, hint=hint)
        self._last.append(loss)


def watched(metrics: Mapping[str, float]) -> float:
    """The loss that stands for the run: ``loss_full``, or ``loss_dial`` where the full dial is not run."""
    return metrics["loss_full"] if "loss_full" in metrics else metrics["loss_dial"]


@contextmanager
def ending() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM ends nothing at once; the function that is handed out says whether one came.

    Outside the main thread, where signals cannot be caught, none ever comes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def memory_errors(config: RunConfig, ranks: int = 1) -> Iterator[None]:
    """Turns running out of memory into a message that says which setting to change, and to what.

    Raises:
        ConfigError: Memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _ran_out(error):
            raise
        tuning = config.finetune
        windows = -(-tuning.batch_size // (ranks * tuning.accumulation))
        raise ConfigError(
            "fine-tuning needs more memory than there is",
            where=f"finetune, {windows} windows of {config.data.sequence_length} tokens at a time on each device",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            hint=_less(config, ranks),
        ) from error


def _ran_out(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        "DefaultCPUAllocator" in text or "not enough memory" in text
    )


def _less(config: RunConfig, ranks: int) -> str:
    """The setting that needs less memory at the smallest price: same result first, then the same but slower."""
    tuning, mine = config.finetune, max(1, config.finetune.batch_size // ranks)
    divisors = [n for n in range(2 * tuning.accumulation, mine + 1) if tuning.batch_size % n == 0]
    if divisors:
        return f"finetune.accumulation={divisors[0]} (now {tuning.accumulation}): the same training, fewer at a time"
    if not tuning.gradient_checkpointing:
        return "finetune.gradient_checkpointing=true: the same training, a third slower"
    if tuning.trainable in ("all", "ffn"):
        return "finetune.trainable=lora: no gradients and moments of the weights themselves"
    shorter = max(2, config.data.sequence_length // 2)
    return f"data.sequence_length={shorter} (now {config.data.sequence_length}), or a machine with more memory"
