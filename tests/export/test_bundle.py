"""Exported code stands alone: flat, complete, and free of dynaconv."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from dynaconv.export.bundle import ENTRY_CLASS, ENTRY_FILE, flat_name, shipped_modules, write_bundle

OUTSIDE = {"torch", "transformers", "safetensors", "numpy"}


def test_every_import_is_shipped_or_on_the_index(tmp_path: Path) -> None:
    names = write_bundle(tmp_path, "qwen2")
    assert f"{ENTRY_CLASS}.config_class = transformers.Qwen2Config" in (tmp_path / f"{ENTRY_FILE}.py").read_text()
    stems = {name.removesuffix(".py") for name in names}
    assert ENTRY_FILE in stems
    for name in names:
        for node in ast.walk(ast.parse((tmp_path / name).read_text())):
            if isinstance(node, ast.Import):
                tops = {alias.name.split(".")[0] for alias in node.names}
                assert tops <= OUTSIDE | set(sys.stdlib_module_names), name
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.module in stems, name
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] in OUTSIDE | set(sys.stdlib_module_names), name


def test_names_do_not_collide_and_the_class_is_there() -> None:
    modules = shipped_modules()
    assert len({flat_name(module) for module in modules}) == len(modules)
    assert f"class {ENTRY_CLASS}" in modules["dynaconv.dynamic.modeling"]
    assert flat_name("dynaconv.frontier") == "dynaconv_frontier" and "dynaconv.frontier" in modules
    assert not any("curves" in module for module in modules), "what only training needs stays at home"


def test_routers_and_the_frontier_have_flat_names() -> None:
    assert flat_name("dynaconv.dynamic.routers.linear") == "dynaconv_routers_linear"
    assert flat_name("dynaconv.frontier") == "dynaconv_frontier"
    assert {"dynaconv.frontier", "dynaconv.dynamic.routers.kinds", "dynaconv.kernels.op"} <= shipped_modules().keys()


def test_the_files_import_and_run_where_there_is_no_dynaconv(tmp_path: Path) -> None:
    """Two exported models in one process, each with an operator of its own."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_bundle(tmp_path / folder, "llama")
    code = f"""
import importlib, pickle, sys
sys.modules["dynaconv"] = None
sys.path.insert(0, {str(tmp_path)!r})
for folder in ("one", "two"):
    model = importlib.import_module(folder + ".modeling_dynaconv")
    op = importlib.import_module(folder + ".dynaconv_kernels_op")
    kinds = importlib.import_module(folder + ".dynaconv_routers_kinds")
    made = model.LlamaForCausalLM
    assert pickle.loads(pickle.dumps(made)) is made and made.__module__ == folder + ".modeling_dynaconv"
    print(op.blocked_ffn._qualname, *kinds.KINDS)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    lines = [line.split() for line in found.stdout.splitlines()]
    assert lines[0][0] != lines[1][0]
    assert set(lines[0][1:]) == {"none", "width", "curve", "class", "linear", "sketch"}
