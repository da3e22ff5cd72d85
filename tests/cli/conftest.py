"""Runs commands in this process, and one tiny converted run that the tests of this folder share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import make_checkpoint
from typer.testing import CliRunner

from dynaconv.cli.app import app
from dynaconv.errors import DynaconvError

TINY = [
    "--recipe",
    "routed",
    "data.sequence_length=32",
    "block_size=24",
    "profile.tokens=512",
    "profile.batch_size=4",
    "finetune.tokens=256",
    "finetune.batch_size=2",
    "finetune.wandb=off",
    "finetune.router_rank=8",
    "calibrate.budgets=[0.25,0.5]",
    "calibrate.tokens=256",
    "calibrate.score_tokens=256",
    "calibrate.speed_tokens=0",
    "export.check=false",
]


class Ran:
    """What a command did: exit code, stdout and stderr."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture(scope="session")
def dynaconv() -> Callable[..., Ran]:
    """Runs ``dynaconv ARGUMENTS``; anything but a clean exit fails the test."""

    def run(*arguments: object) -> Ran:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        unexpected = result.exception
        if unexpected is not None and not isinstance(unexpected, SystemExit | DynaconvError):
            raise unexpected
        assert "Traceback" not in result.stderr
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch, dynaconv: Callable[..., Ran]) -> Callable[..., list[str]]:
    """Runs ``dynaconv ARGUMENTS`` as on a terminal of so many columns; returns the lines on stdout without colors."""

    def run(columns: int, *arguments: object) -> list[str]:
        for name, value in {"TERM": "xterm", "FORCE_COLOR": "1", "COLUMNS": str(columns)}.items():
            monkeypatch.setenv(name, value)
        return re.sub("\x1b\\[[0-9;]*m", "", dynaconv(*arguments).out).splitlines()

    return run


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense checkpoint."""
    return make_checkpoint(tmp_path_factory.mktemp("dense") / "parent")


@pytest.fixture(scope="session")
def converted(
    tmp_path_factory: pytest.TempPathFactory, dense: Path, text_file: Path, dynaconv: Callable[..., Ran]
) -> Iterator[Path]:
    """A finished run of all stages on a tiny checkpoint. Tests must leave it as it is."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    ran = dynaconv("convert", dense, "--out", run, *TINY, f"data={text_file}", "data.validation_share=0.5")
    assert ran.code == 0, ran.err
    yield run
