"""The code that travels with an exported model: flat files that transformers loads with ``trust_remote_code=True``.

Sources are our own ``dynamic``, ``kernels`` and ``frontier`` modules that the model class reaches. transformers wants
one folder and relative imports, so ``from dynaconv.dynamic.dial import Dial`` becomes ``from .dynaconv_dial import
Dial``.
"""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

ENTRY = "dynaconv.dynamic.modeling"
ENTRY_FILE = "modeling_dynaconv"
ENTRY_CLASS = "DynaconvForCausalLM"
_OURS = re.compile(r"^(\s*)from (dynaconv\.(?:frontier|dynamic(?:\.\w+)+|kernels\.\w+)) import ", re.MULTILINE)


def flat_name(module: str) -> str:
    """File stem of ``module`` in an exported folder."""
    if module == ENTRY:
        return ENTRY_FILE
    return "dynaconv_" + module.removeprefix("dynaconv.").removeprefix("dynamic.").replace(".", "_")


def shipped_modules() -> dict[str, str]:
    """Source text of every module that the model class reaches, by module name."""
    found: dict[str, str] = {}
    waiting = [ENTRY]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found[module] = _source(module)
        waiting += [
            node.module
            for node in ast.walk(ast.parse(found[module]))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dynaconv.")
        ]
    return found


def write_bundle(folder: Path, model_type: str) -> list[str]:
    """Writes the flat files into ``folder`` and returns their names.

    Args:
        folder: The exported folder.
        model_type: The parent's. Its config class is named in the entry file, since transformers compares the two.
    """
    from transformers import AutoConfig

    config_class = type(AutoConfig.for_model(model_type)).__name__
    names = []
    for module, source in sorted(shipped_modules().items()):
        name = f"{flat_name(module)}.py"
        flat = _OURS.sub(lambda match: f"{match[1]}from .{flat_name(match[2])} import ", source)
        if module == ENTRY:
            flat += f"\n\n{ENTRY_CLASS}.config_class = transformers.{config_class}  # written by export\n"
        (folder / name).write_text(flat, encoding="utf-8")
        names.append(name)
    return names


def _source(module: str) -> str:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")
