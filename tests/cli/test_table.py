"""Tables: at any width every cell that is shown is whole, and what is not shown is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynaconv.cli.convert import PLAN_COLUMNS
from dynaconv.cli.listing import STAGE_COLUMNS
from dynaconv.cli.table import GAP, Column, fit, wrap

WORDS = st.text("abcdef0123456789.", min_size=1, max_size=12)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[Column], list[list[str]]]:
    count = draw(st.integers(1, 6))
    columns = [
        Column(f"{draw(WORDS)}/{draw(WORDS)} {index}", draw(st.booleans()), optional=draw(st.integers(0, 3)))
        for index in range(count)
    ]
    columns.append(Column("notes", words=True, wraps=12))
    cells = st.lists(WORDS, min_size=count, max_size=count)
    notes = st.lists(WORDS, max_size=8).map(" ".join)
    rows = [[*draw(cells), draw(notes)] for _ in range(draw(st.integers(1, 4)))]
    return columns, rows


@given(tables(), st.integers(1, 200))
def test_every_cell_is_there_or_its_column_is_named(table: tuple[list[Column], list[list[str]]], width: int) -> None:
    columns, rows = table
    fitted = fit(columns, rows, width)
    shown = [index for index, column in enumerate(columns) if column.name not in fitted.left_out]
    assert all(column.optional for column in columns if column.name in fitted.left_out)
    for row, lines in zip(rows, fitted.rows, strict=True):
        words = [word for line in lines for word in line.split()]  # all cells but the last have one line
        assert words == " ".join(row[index] for index in shown).split()
    header = "".join(fitted.header)
    assert all(part in header for index in shown for part in re.split("[/ ]", columns[index].name))


@given(tables(), st.integers(1, 200))
def test_it_fits_where_it_can(table: tuple[list[Column], list[list[str]]], width: int) -> None:
    columns, rows = table
    fitted = fit(columns, rows, width)
    longest = max(len(line) for lines in (fitted.header, *fitted.rows) for line in lines)
    if longest > width:
        assert len(fitted.left_out) == sum(column.optional > 0 for column in columns), "nothing more can be left out"


def test_the_least_important_goes_first() -> None:
    columns = [Column("a"), Column("b", optional=2), Column("c", optional=1)]
    rows = [["1" * 10, "2" * 10, "3" * 10]]
    whole = 3 * (10 + GAP)
    assert fit(columns, rows, whole).left_out == []
    assert fit(columns, rows, whole - 1).left_out == ["b"]
    assert fit(columns, rows, 10 + GAP).left_out == ["b", "c"]
    assert fit(columns, rows, 5).rows == [["  " + "1" * 10]], "too narrow even so: the terminal wraps it"


def test_a_name_and_its_value_stay_together() -> None:
    cell = "half_width_error 0.11735  importance_of_first_half 0.52342"
    assert wrap([cell], 40) == ["half_width_error 0.11735", "importance_of_first_half 0.52342"]
    assert wrap([cell], 26) == ["half_width_error 0.11735", "importance_of_first_half", "0.52342"]


STAGES = [
    ["profile", "interrupted", "1:13:26", "777.6 MB", "0ce5ecbe0855", "tokens 65536  half_width_error 0.1173"],
    ["finetune", "done", "19:19", "582.5 MB", "5b821038f6d9", "loss_full 3.1639  kl_dial 0.015903  steps 1464"],
]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_stages_are_whole(width: int) -> None:
    fitted = fit(STAGE_COLUMNS, STAGES, width)
    text = "\n".join(line for lines in (fitted.header, *fitted.rows) for line in lines)
    assert max(map(len, text.splitlines())) <= width
    assert fitted.left_out == (["fingerprint"] if width == 80 else [])
    for row in STAGES:
        for name, cell in zip((column.name for column in STAGE_COLUMNS), row, strict=True):
            assert name in fitted.left_out or all(part in text for part in cell.split("  "))


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_plan_is_whole(width: int) -> None:
    why = "the setting finetune.tokens changed\n1,464 steps of 1,024 tokens, 7 budgets"
    rows = [["03-finetune", "interrupted", "582.3 MB", "100.1 MB", "1.23T", why]]
    fitted = fit(PLAN_COLUMNS, rows, width)
    assert fitted.left_out == []
    (lines,) = fitted.rows
    assert max(map(len, lines)) <= width
    words = [word for line in lines for word in line.split()]
    assert words == " ".join(rows[0]).split()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_status_and_plan_of_a_run_fit_the_terminal(
    on_terminal: Callable[..., list[str]], dynaconv: Callable, converted: Path, width: int
) -> None:
    for command in ("status", "plan"):
        stages = json.loads(dynaconv(command, converted, "--json").out)["stages"]
        lines = on_terminal(width, command, converted)
        table = [line for line in lines if line.startswith("  ")]
        assert len(table) >= len(stages) and max(map(len, table)) <= width
        for stage in stages:
            assert any(stage["name"] in line.split()[0] for line in table)
