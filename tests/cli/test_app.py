"""The front door: quick, quiet, and every error one message with the right exit code."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dynaconv.recipes
from dynaconv.cli.app import app
from dynaconv.errors import ArtifactError, ConfigError, DynaconvError, ExportError, QualityError
from dynaconv.version import __version__

DYNACONV = [sys.executable, "-c", "from dynaconv.cli.app import main; main()"]
STAGES = ["profile", "carve", "finetune", "calibrate", "export"]
COMMANDS = ["convert", "plan", *STAGES, "status", "dial-k", "eval", "generate", "bench", "recipes", "doctor"]


def test_help_is_quick() -> None:
    """CPU time, not the clock, so that a busy machine does not decide; best of three."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = subprocess.run([*DYNACONV, "--help"], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert all(command in shown.stdout for command in COMMANDS)
    assert min(spent) < 0.5


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from dynaconv.cli.app import app\n"
        "try: app(['--help'])\n"
        "finally: print(*sorted({'torch', 'transformers', 'hydra', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stderr.strip() == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(dynaconv: Callable, command: str) -> None:
    ran = dynaconv(command, "--help")
    assert ran.code == 0
    assert f"{command} [OPTIONS]" in ran.out


def test_version(dynaconv: Callable) -> None:
    assert dynaconv("--version").out == f"{__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["nope"], ["convert", "--nope"], ["dial-k"], ["dial-k", "x", "--budget", "much"]]
)
def test_wrong_usage_is_2(dynaconv: Callable, arguments: list[str]) -> None:
    assert dynaconv(*arguments).code == 2


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Makes ``dynaconv recipes`` raise ``error``."""

    def fail() -> None:
        raise error

    monkeypatch.setattr(dynaconv.recipes, "available", fail)


@pytest.mark.parametrize(
    ("kind", "code"), [(DynaconvError, 1), (ConfigError, 2), (ArtifactError, 3), (QualityError, 4), (ExportError, 5)]
)
def test_our_errors_are_one_message_and_a_code(monkeypatch: pytest.MonkeyPatch, kind: type, code: int) -> None:
    failing(monkeypatch, kind("it [red]broke[/red] [0, 1]", where="/a [b]", expected="[x]", found=3, hint="do [/that]"))
    result = CliRunner().invoke(app, ["recipes"])
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: it [red]broke[/red] [0, 1]",
        "  where: /a [b]",
        "  expected: [x]",
        "  found: 3",
        "  try: do [/that]",
    ]


def test_a_long_line_is_not_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ConfigError("x" * 500))
    assert CliRunner().invoke(app, ["recipes"]).stderr == f"error: {'x' * 500}\n"


def test_interrupted_is_130_and_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    result = CliRunner().invoke(app, ["recipes"])
    assert result.exit_code == 130
    assert "rerun the same command to go on" in result.stderr


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    code = (
        "import dynaconv.recipes as r\n"
        "def bug(): raise RuntimeError('a bug')\n"
        "r.available = bug\n"
        "import sys; sys.argv = ['dynaconv', 'recipes']\n"
        "from dynaconv.cli.app import main; main()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "Traceback" in ran.stderr
    assert ran.stderr.rstrip().endswith("RuntimeError: a bug")


def test_recipes_are_listed_and_printed(dynaconv: Callable) -> None:
    listed = dynaconv("recipes").out
    assert all(f"{name} " in listed for name in dynaconv_recipes()), "each name stands apart from what it does"
    assert dynaconv("recipes", "smoke").out.strip() == dynaconv_recipes()["smoke"].path.read_text().strip()
    ran = dynaconv("recipes", "smok")
    assert (ran.code, ran.out) == (2, "")
    assert "--recipe smoke" in ran.err


def dynaconv_recipes() -> dict[str, dynaconv.recipes.Recipe]:
    return dynaconv.recipes.available()


def test_doctor_is_content_here(dynaconv: Callable) -> None:
    ran = dynaconv("doctor")
    assert ran.code == 0
    assert all(
        word in ran.out for word in ("torch", "transformers", "triton", "deepspeed", "wandb", "cpu", "disk", "cache")
    )


def test_doctor_finds_what_is_missing(dynaconv: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from importlib import metadata

    monkeypatch.setattr(metadata, "requires", lambda name: ["not-a-package>=1", "torch>=999", "typer>=0.1"])
    ran = dynaconv("doctor")
    assert ran.code == 3
    assert "missing: pip install 'not-a-package>=1'" in ran.out
    assert "too old: pip install 'torch>=999'" in ran.out
    assert "not-a-package, torch" in ran.err
