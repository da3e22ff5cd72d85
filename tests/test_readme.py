"""Every command that a document shows is one that exists, with options and settings that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from dynaconv.cli.app import app
from dynaconv.cli.request import request

ROOT = Path(__file__).resolve().parent.parent
SHOWN = re.compile(r"^(?:    |\$ )(dynaconv .*?)(?:\s{2,}#.*)?$", re.MULTILINE)
MADE = re.compile(r"^(?:    |\$ )make (\w+)", re.MULTILINE)
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]


def commands() -> list[str]:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS]
    made = re.findall(r"^\t\$\(BIN\)/(dynaconv .*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return sorted({match for text in texts for match in SHOWN.findall(text)} | set(made))


@pytest.mark.parametrize("line", commands())
def test_a_command_that_is_shown_can_be_typed(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    given = command.make_context(name, arguments).params
    if name in ("convert", "plan"):
        asked = request(given["source"], given["overrides"] or (), recipe=given["recipe"], out=given["out"])
        assert asked.problems(given["until"], given["redo"]) == []


def test_there_are_commands_to_look_at() -> None:
    names = {line.split()[1] for line in commands()}
    assert {"convert", "dial-k"} <= names


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_that_are_shown_exist(name: str) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = set(MADE.findall((ROOT / name).read_text(encoding="utf-8")))
    assert shown
    assert shown <= targets
