"""Tables that fit the terminal: a column that matters less is left out by name, and no cell is ever cut.

A table that is too wide first wraps its column of words, then puts its headers on several lines, then leaves out the
columns that are optional and says which. If even that is too wide, the terminal wraps the lines.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH_IN_A_PIPE = 160
GAP = 2

Cells = list[list[list[str]]]
"""Lines of each cell, by row and column."""


@dataclass(frozen=True)
class Column:
    """What is to be known of a column to lay it out.

    Attributes:
        name: Header. May be broken at spaces, and at slashes before more than one letter.
        words: Aligned to the left, as words are; numbers are aligned to the right.
        wraps: Words may go on in the next line of the cell, which is made no narrower than this number of characters.
            Where a cell has double spaces, it is broken there only. 0 for a column that stays as wide as it is.
        optional: 0 for a column that is always shown. Of the others, the one with the highest value is left out first.
    """

    name: str
    words: bool = False
    wraps: int = 0
    optional: int = 0


@dataclass(frozen=True)
class Fitted:
    """A table laid out in lines.

    Attributes:
        header: Lines of the header; none where no column has a name.
        rows: Lines of each row.
        left_out: Names of the columns that are not shown.
    """

    header: list[str]
    rows: list[list[str]]
    left_out: list[str]


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[str]], *, marked: int | None = None) -> None:
    """Prints a table on stdout, as wide as the terminal or 160 characters in a pipe; row ``marked`` is emphasised."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    width = console.width if console.is_terminal else WIDTH_IN_A_PIPE
    fitted = fit(columns, list(rows), width)
    console.print()
    for line in fitted.header:
        console.print(Text(line, style="bold"))
    if fitted.header:
        longest = max(len(line) for lines in (fitted.header, *fitted.rows) for line in lines)
        console.print(" " + "─" * (longest - 1))
    for number, row in enumerate(fitted.rows):
        for line in row:
            console.print(Text(line, style="bold green" if number == marked else ""))
    console.print()
    if fitted.left_out:
        names = ", ".join(fitted.left_out)
        console.print(f"Left out at {width} columns: {names}. A wider terminal or --json shows them.")


def fit(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> Fitted:
    """Lays a table out in ``width`` characters, without columns that do not fit as far as they are optional."""
    shown = list(range(len(columns)))
    while True:
        chosen = [columns[index] for index in shown]
        cells = [[row[index].split("\n") for index in shown] for row in rows]
        for headers in ([[column.name] for column in chosen], [_broken(column.name) for column in chosen]):
            widths = _widths(chosen, headers, cells, width)
            if sum(widths) + GAP * len(widths) <= width:
                break
        else:
            least = max(shown, key=lambda index: columns[index].optional)
            if columns[least].optional:
                shown.remove(least)
                continue
        left_out = [column.name for index, column in enumerate(columns) if index not in shown]
        header = _lines(chosen, headers, widths) if any(column.name for column in chosen) else []
        return Fitted(header, [_lines(chosen, row, widths) for row in cells], left_out)


def wrap(lines: Sequence[str], width: int) -> list[str]:
    """``lines`` in ``width`` characters: broken at double spaces where a line has some, else at spaces.

    What is too long for that is broken at spaces after all, and a word that is longer goes on in the next line.
    """
    wrapped: list[str] = []
    for line in lines:
        if "  " in line and max(map(len, line.split("  "))) <= width:  # keep a name and its value on one line
            line = re.sub(r"(?<! ) (?! )", "\N{NO-BREAK SPACE}", line)
        pieces = textwrap.wrap(line, width, break_on_hyphens=False) or [""]
        wrapped += [piece.replace("\N{NO-BREAK SPACE}", " ") for piece in pieces]
    return wrapped


def _broken(name: str) -> list[str]:
    """A header on several lines: ``["FLOPs/", "token"]``."""
    return re.split(r" |(?<=/)(?=\w\w)", name)


def _widths(columns: Sequence[Column], headers: list[list[str]], cells: Cells, width: int) -> list[int]:
    """Characters of each column; one that wraps has what the others leave, within reason."""
    whole = [
        max(len(line) for cell in (header, *(row[index] for row in cells)) for line in cell)
        for index, header in enumerate(headers)
    ]
    for index, column in enumerate(columns):
        if column.wraps:
            room = width - GAP * len(columns) - sum(whole) + whole[index]
            whole[index] = min(whole[index], max(room, column.wraps))
    return whole


def _lines(columns: Sequence[Column], row: list[list[str]], widths: Sequence[int]) -> list[str]:
    """The lines of the header or of a row."""
    cells = [
        wrap(cell, width) if column.wraps else cell for column, cell, width in zip(columns, row, widths, strict=True)
    ]
    lines = []
    for number in range(max(map(len, cells))):
        texts = [cell[number] if number < len(cell) else "" for cell in cells]
        aligned = [
            text.ljust(width) if column.words else text.rjust(width)
            for column, text, width in zip(columns, texts, widths, strict=True)
        ]
        lines.append("".join(" " * GAP + text for text in aligned).rstrip())
    return lines
