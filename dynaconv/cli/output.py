"""What the commands print: results on stdout, everything else on stderr, JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dynaconv.errors import DynaconvError

if TYPE_CHECKING:
    from rich.text import Text

WIDTH_IN_A_PIPE = 160


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


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, left: int = 1, last: bool = False
) -> None:
    """Prints a table on stdout. The first ``left`` columns are words, and the ``last`` one if set; others numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_header=any(columns))
    for position, name in enumerate(columns):
        words = position < left or (last and position == len(columns) - 1)
        table.add_column(name, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:  # in a pipe: as wide as it needs to be, not 80 columns
        console = Console(highlight=False, width=WIDTH_IN_A_PIPE)
    console.print(table)


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
