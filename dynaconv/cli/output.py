"""What the commands print: results on stdout, everything else on stderr, JSON for machines."""

from __future__ import annotations

import json
import sys
from typing import Any

from dynaconv.errors import DynaconvError


def print_json(content: Any) -> None:
    """Prints ``content`` as JSON on stdout, and nothing else."""
    sys.stdout.write(json.dumps(content, indent=2, default=str) + "\n")


def print_error(error: DynaconvError) -> None:
    """Prints ``error`` on stderr: what failed, then where, what was expected and found, and what to try."""
    from rich.console import Console
    from rich.text import Text

    what, _, rest = str(error).partition("\n")
    text = Text.assemble(("error: ", "bold red"), (what, "bold"), f"\n{rest}" if rest else "")
    Console(stderr=True, highlight=False, soft_wrap=True).print(text)


def print_note(line: str) -> None:
    """Prints a line on stderr, brackets and all as they are."""
    sys.stderr.write(line + "\n")


def say(line: str) -> None:
    """Prints a line for people on stdout, brackets and all as they are."""
    sys.stdout.write(line + "\n")


def say_wrapped(sentence: str) -> None:
    """As :func:`say`; a terminal breaks it between words, never within a number."""
    from shutil import get_terminal_size
    from textwrap import fill

    if sys.stdout.isatty():
        sentence = fill(sentence, get_terminal_size().columns, break_long_words=False, break_on_hyphens=False)
    say(sentence)


def in_short(count: float | None) -> str:
    """``1.5M`` for 1 500 000; a dash where it is not known."""
    if count is None:
        return "-"
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(count) < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}E"


def in_time(seconds: float | None) -> str:
    """``3:07`` minutes; a dash where it is not known."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
