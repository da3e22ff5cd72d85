"""Exported code stands alone: flat, complete, and free of dynaconv."""

from __future__ import annotations

import ast
from pathlib import Path

from dynaconv.export.bundle import ENTRY_CLASS, ENTRY_FILE, flat_name, shipped_modules, write_bundle

OUTSIDE = {"torch", "transformers", "safetensors"}


def test_every_import_is_shipped_or_on_the_index(tmp_path: Path) -> None:
    import sys

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
