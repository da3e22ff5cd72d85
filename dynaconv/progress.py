"""The one progress display: stage, item i of n, tokens a second, time left, peak memory.

On a terminal one live line a task; elsewhere plain lines, at most one every few seconds. All of it goes to stderr, so
that stdout is the result's, and to the log, so that nothing lives only on the screen.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from dynaconv.artifacts.files import size_text
from dynaconv.memory import peak_rss_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

SECONDS_BETWEEN_LINES = 5.0
REFRESHES_PER_SECOND = 4
BAR_WIDTH, NARROW_BAR_WIDTH = 16, 8
WIDE = 110
"""Columns of a terminal from which on the bar has its full width."""

log = logging.getLogger("dynaconv")


@dataclass
class Task:
    """Something that is being counted. Made by :meth:`Progress.task`.

    Attributes:
        name: What is being done.
        total: How many items there are.
        unit: What is counted: layers, steps, windows.
        done: How many items are finished.
        tokens: Tokens gone through since the start.
        note: Last thing worth knowing, such as the loss.
        started: When this process began it, by the monotonic clock.
        first: How many items were finished then.
    """

    progress: Progress
    name: str
    total: float
    unit: str
    done: float = 0
    tokens: float = 0
    note: str = ""
    started: float = 0
    first: float = 0

    def advance(self, count: float = 1, *, tokens: float = 0, note: str | None = None) -> None:
        """``count`` more items are done; ``tokens`` went through them; ``note`` replaces the last one."""
        self.done += count
        self.tokens += tokens
        self.note = self.note if note is None else note
        self.progress.changed(self)

    @property
    def elapsed(self) -> float:
        """Seconds since the task began."""
        return time.monotonic() - self.started

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds to the end, ``None`` before the first item is done."""
        fresh = self.done - self.first
        return None if fresh <= 0 else self.elapsed / fresh * max(0.0, self.total - self.done)

    @property
    def rate(self) -> str:
        """Tokens a second where tokens are counted, else items a second."""
        seconds = max(self.elapsed, 1e-9)
        if self.tokens:
            return f"{_count(self.tokens / seconds)} tokens/s"
        return f"{_count((self.done - self.first) / seconds)} {self.unit}/s"

    @property
    def count(self) -> str:
        """How many items are done, of how many."""
        return f"{_whole(self.done)}/{_whole(self.total)} {self.unit}"

    @property
    def time(self) -> str:
        """The time left, or the time taken at the end and before the first item is done."""
        left = self.seconds_left
        return (
            f"{_clock(left)} left" if left is not None and self.done < self.total else f"{_clock(self.elapsed)} so far"
        )

    def words(self) -> str:
        """Everything but the name, in one line."""
        return _joined([self.count, self.rate, self.time, self.note, _peak()])

    def lines(self, width: int) -> list[str]:
        """As :meth:`words`, in ``width`` characters as far as that goes.

        Peak memory is the first to go. A note for which there is no room then has a line of its own, and the rate goes
        last; a terminal that is narrower still breaks the line.
        """
        always, note = [self.count, self.rate, self.time], [f"  {self.note}"] if self.note else []
        for line in (self.words(), _joined([*always, self.note])):
            if len(line) <= width:
                return [line]
        wider = ([*always, _peak()], always)
        return [next((line for line in map(_joined, wider) if len(line) <= width), f"{self.count}  {self.time}"), *note]


class Progress:
    """Context manager around everything that takes time.

    Args:
        quiet: Show nothing; only the log is written.
        stream: Where to show it.
        plain: Lines even on a terminal.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None, plain: bool = False) -> None:
        self.quiet = quiet
        self.stream = stream or sys.stderr
        self.live_wanted = not quiet and not plain and self.stream.isatty()
        self.stage = ""
        self._tasks: list[Task] = []
        self._last_line = float("-inf")
        self._live: Live | None = None
        self._console: Console | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tasks.clear()
        self._stop()

    def say(self, line: str) -> None:
        """Shows a line that stays, and logs it."""
        log.info("%s", line)
        self.show(line)

    def show(self, line: str) -> None:
        """Shows a line that stays, without logging it."""
        if self.quiet:
            return
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.stream, flush=True)

    @contextmanager
    def in_stage(self, name: str, position: int, count: int) -> Iterator[None]:
        """Names the stage that is running, ``position`` of ``count``, in front of its tasks."""
        self.stage = f"{position}/{count} {name}"
        try:
            yield
        finally:
            self.stage = ""

    @contextmanager
    def task(self, name: str, total: float, unit: str = "items", *, done: float = 0) -> Iterator[Task]:
        """Shows ``name`` counting up to ``total``, from ``done`` on where an interrupted task goes on."""
        task = Task(self, name, total, unit, done=done, first=done, started=time.monotonic())
        self._tasks.append(task)
        self._start()
        self._last_line = time.monotonic()
        try:
            yield task
            line = f"{self._title(task)}  {task.words()}"
            log.info("%s", line)
            if self._live is None:
                self.show(line)
        finally:
            if task in self._tasks:
                self._tasks.remove(task)
            if not self._tasks:
                self._stop()

    def changed(self, task: Task) -> None:
        """A task moved on: without a live display, a line is due every few seconds."""
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES and task.done < task.total:
            self._last_line = now
            line = f"{self._title(task)}  {task.words()}"
            log.info("%s", line)
            if self._live is None:
                self.show(line)

    def _title(self, task: Task) -> str:
        if not self.stage:
            return task.name
        return self.stage if self.stage.endswith(task.name) else f"{self.stage}: {task.name}"

    def _start(self) -> None:
        if not self.live_wanted or self._live is not None:
            return
        from rich.console import Console
        from rich.live import Live

        self._console = self._console or Console(file=self.stream)
        self._live = Live(
            console=self._console,
            get_renderable=self._lines,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def _stop(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def _lines(self) -> Text:
        from rich.text import Text

        assert self._console is not None
        text = Text(overflow="fold")
        for task in list(self._tasks):
            title, width = self._title(task), self._console.width
            bar = BAR_WIDTH if width >= WIDE else NARROW_BAR_WIDTH
            filled = int(bar * min(1.0, task.done / task.total)) if task.total else 0
            text.append("\n" if text else "")
            text.append(f"{title} ", style="bold")
            text.append("━" * filled, style="green")
            text.append("━" * (bar - filled), style="bright_black")
            text.append(" " + "\n".join(task.lines(width - len(title) - bar - 2)))
        return text


def _count(value: float) -> str:
    for unit in ("", "k", "M"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"


def _peak() -> str:
    return f"peak {size_text(peak_rss_bytes())}"


def _joined(parts: list[str]) -> str:
    return "  ".join(part for part in parts if part)


def _whole(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
