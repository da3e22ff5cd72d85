"""The display tells the truth, keeps off stdout, and all of it is in the log."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import time

import pytest

from dynaconv import progress as module
from dynaconv.memory import available_bytes, peak_rss_bytes, reset_peak, rss_bytes
from dynaconv.progress import Progress

GROW = """
from dynaconv.memory import peak_rss_bytes, reset_peak
def touch():
    block = bytearray(200_000_000)
    block[::4096] = b"x" * len(block[::4096])
before = peak_rss_bytes()
touch()
grown = peak_rss_bytes()
allowed = reset_peak()
print(before, grown, allowed, peak_rss_bytes())
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_are_few_and_true(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dynaconv")
    stream = io.StringIO()
    with (
        Progress(stream=stream) as progress,
        progress.in_stage("profile", 1, 5),
        progress.task("profile", total=100, unit="layers") as task,
    ):
        for i in range(100):
            clock[0] += 0.5
            task.advance(1, tokens=2000, note=f"loss {i}")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10  # 50 seconds, a line every 5, the last one at the end
    assert lines[0].startswith("1/5 profile  10/100 layers  4k tokens/s  0:45 left  loss 9  peak ")
    assert lines[-1].startswith("1/5 profile  100/100 layers  4k tokens/s  0:50 so far")
    assert [record.getMessage() for record in caplog.records] == lines


def test_a_task_that_goes_on_does_not_count_what_was_done_before(clock: list[float]) -> None:
    with Progress(quiet=True) as progress, progress.task("finetune", total=100, unit="steps", done=50) as task:
        assert task.seconds_left is None
        clock[0] += 20
        task.advance(10)
        assert task.seconds_left == pytest.approx(80)
        assert task.rate == "0.5 steps/s"


def test_quiet_shows_nothing_but_logs(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dynaconv")
    with Progress(quiet=True) as progress, progress.task("x", total=1) as task:
        progress.say("hello [bold]")
        task.advance()
    assert capsys.readouterr() == ("", "")
    assert caplog.messages[0] == "hello [bold]"
    assert caplog.messages[1].startswith("x  1/1 items")


def test_everything_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        progress.say("hello")
        with progress.task("x", total=1) as task:
            task.advance()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("hello\nx  1/1 items")


def test_live_display_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFRESHES_PER_SECOND", 100)
    stream = Terminal()
    with Progress(stream=stream) as progress, progress.in_stage("carve", 2, 5):
        with progress.task("carve", total=4, unit="layers") as task:
            task.advance(3, note="half [way]")
            progress.say("a line that stays")
            time.sleep(0.2)
        progress.say("after")
    shown = stream.getvalue()
    assert "2/5 carve" in shown
    assert "3/4 layers" in shown
    assert "a line that stays" in shown
    assert shown.rstrip().endswith("after")
    assert "\x1b[?25h" in shown  # the cursor is back


NOTES = ["loss 10.164 dial 10.203 kl 10.016", "difference 1.2e-07, loss 12.345", "budget 0.375 spends 0.379"]


@pytest.mark.parametrize("note", NOTES)
@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_note_is_whole_at_any_width(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, width: int, note: str
) -> None:
    from rich.console import Console

    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with (
        Progress(stream=stream) as progress,
        progress.in_stage("finetune", 3, 5),
        progress.task("finetune", total=20_000, unit="steps") as task,
    ):
        clock[0] += 3000
        task.advance(12_500, tokens=8e6, note=note)
        shown = Console(file=io.StringIO(), width=width)
        shown.print(progress._lines())
    lines = shown.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("3/5 finetune ━")
    text = "\n".join(lines)
    assert all(part in text for part in ("12500/20000 steps", "2.67k tokens/s", "30:00 left", note))


def test_memory_is_the_first_to_go(clock: list[float]) -> None:
    with Progress(quiet=True) as progress, progress.task("finetune", total=32, unit="steps") as task:
        clock[0] += 10
        task.advance(25, tokens=26_700, note="loss 3.1")
        whole = task.words()
        assert whole.startswith("25/32 steps  2.67k tokens/s  0:03 left  loss 3.1  peak ")
        assert task.lines(len(whole)) == [whole]
        without = whole.partition("  peak")[0]
        assert task.lines(len(whole) - 1) == [without]
        assert task.lines(len(without)) == [without]
        assert task.lines(len(without) - 1) == ["25/32 steps  2.67k tokens/s  0:03 left", "  loss 3.1"]
        assert task.lines(25) == ["25/32 steps  0:03 left", "  loss 3.1"]


def test_an_error_within_ends_the_display() -> None:
    stream = Terminal()
    with pytest.raises(ZeroDivisionError), Progress(stream=stream) as progress, progress.task("x", total=2):
        raise ZeroDivisionError
    assert "\x1b[?25h" in stream.getvalue()
    assert "so far" not in stream.getvalue().split("\x1b[?25h")[-1]


def test_peak_memory_follows_and_is_set_back() -> None:
    done = subprocess.run([sys.executable, "-c", GROW], capture_output=True, text=True, check=True)
    before, grown, allowed, after = done.stdout.split()
    assert int(grown) - int(before) > 150_000_000
    if allowed == "True":
        assert int(grown) - int(after) > 150_000_000


def test_memory_figures_are_plausible() -> None:
    reset_peak()
    assert 10**6 < rss_bytes() < 10**11
    assert peak_rss_bytes() >= 0.9 * rss_bytes()
    available = available_bytes()
    assert available is None or available > 10**6
