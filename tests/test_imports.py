"""Imports run one way through the house, and the parts that ship with a model carry nothing else of ours along."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "dynaconv"
FILES = sorted(PACKAGE.rglob("*.py"))
# Each floor may import from those before it and, within itself, from its own package. The ground floor is one package.
FLOORS = (
    {
        "errors",
        "version",
        "memory",
        "progress",
        "artifacts",
        "config",
        "rules",
        "overrides",
        "recipes",
        "ranks",
        "frontier",
        "threads",
    },
    {"kernels"},
    {"arch", "data"},
    {"dynamic", "pipeline.stage"},
    {"profile"},
    {"convert", "evaluation", "train"},
    {"calibrate"},
    {"export"},
    {"pipeline"},
    {"cli"},
)
LATE = {"numba", "llvmlite"}  # only by files that are imported when they are there
SHIPPED = {
    "dynamic": {"torch", "transformers", "safetensors"},
    "kernels": {"torch", "numpy", *LATE},
    "frontier.py": set[str](),
}
OURS_SHIPPED = re.compile(r"dynaconv\.(dynamic(\.\w+)+|kernels\.\w+|frontier)")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """Full names of all modules imported anywhere in a file, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            assert node.module is not None
            if node.module.count(".") < 1 and node.module == "dynaconv":
                yield from ((f"dynaconv.{alias.name}", node) for alias in node.names)
            else:
                yield node.module, node


def floor(module: str) -> int:
    path = module.removeprefix("dynaconv.")
    for level, names in enumerate(FLOORS):
        if path in names or (path.split(".")[0] in names and path != "pipeline.stage"):
            return level
    raise AssertionError(f"{module} stands on no floor: give it one in FLOORS")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_downwards(path: Path) -> None:
    here = module_name(path)
    if here == "dynaconv":
        pytest.skip("the front door hands out names lazily; see test_front_door")
    for name, node in imported(parse(path)):
        if not name.startswith("dynaconv."):
            continue
        same_package = here.split(".")[1] == name.split(".")[1]
        allowed = floor(name) < floor(here) or floor(name) == 0 == floor(here) or same_package
        assert allowed, f"{here}:{node.lineno} imports {name}, which stands above or beside it"


def test_no_file_imports_itself_in_a_circle() -> None:
    """Counts what is imported late, and for type checkers only."""
    names = {module_name(path) for path in FILES} - {"dynaconv"}
    graph = {module_name(path): {name for name, _ in imported(parse(path)) if name in names} for path in FILES}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_every_part_has_a_floor() -> None:
    for path in FILES:
        if path != PACKAGE / "__init__.py":
            floor(module_name(path))


@pytest.mark.parametrize("part", SHIPPED)
def test_what_ships_with_a_model_stands_alone(part: str) -> None:
    paths = sorted((PACKAGE / part).rglob("*.py")) or [PACKAGE / part]
    for path in paths:
        for name, node in imported(parse(path)):
            top = name.split(".")[0]
            if top == "dynaconv":
                own = OURS_SHIPPED.match(name) and not part.endswith(".py")
                assert own, f"{path.name}:{node.lineno} imports {name}, which does not ship with a model"
                rewritten = isinstance(node, ast.ImportFrom) and OURS_SHIPPED.fullmatch(name)
                assert rewritten, (
                    f"{path.name}:{node.lineno}: write `from dynaconv.{part}.x import y`, as export expects"
                )
            else:
                known = top in SHIPPED[part] or top in sys.stdlib_module_names
                assert known, f"{path.name}:{node.lineno} imports {top}, which a user of the model may not have"


def test_what_ships_with_a_model_runs_without_what_it_may_not_have() -> None:
    code = f"import sys, dynaconv.dynamic.modeling; print(*sorted({LATE!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


@pytest.mark.parametrize("module", ["dynaconv", "dynaconv.cli.app", "dynaconv.config", "dynaconv.recipes"])
def test_front_door_imports_nothing_heavy(module: str) -> None:
    heavy = {"torch", "transformers", "datasets", "hydra", "omegaconf", "numpy", "matplotlib", "wandb", "deepspeed"}
    code = f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_every_python_that_is_started_leaves_the_current_folder_out() -> None:
    started = [
        (path.name, ast.literal_eval(node.elts[1]))
        for path in FILES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.List) and node.elts and ast.unparse(node.elts[0]) == "sys.executable"
    ]
    assert len(started) >= 4
    assert all(first == "-P" for _, first in started), started
