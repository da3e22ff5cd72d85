"""Finds the family of a checkpoint. Every file in ``families/`` that is named after its ``model_type`` is one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from dynaconv.arch import families
from dynaconv.arch.spec import Family
from dynaconv.errors import CheckpointError, UnknownArchitectureError, suggest


@cache
def known_families() -> dict[str, Family]:
    """Every family, by ``model_type``."""
    names = [module.name for module in pkgutil.iter_modules(families.__path__)]
    found: list[Family] = [importlib.import_module(f"{families.__name__}.{name}").FAMILY for name in names]
    return {family.model_type: family for family in found}


def family_for(config: Mapping[str, Any]) -> Family:
    """The family that ``config`` (the content of a ``config.json``) belongs to.

    Raises:
        UnknownArchitectureError: No family has this ``model_type``.
        CheckpointError: The family is known, but the checkpoint is not a causal language model.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError("config.json has no model_type", expected=", ".join(sorted(known_families())))
    family = known_families().get(model_type)
    if family is None:
        raise UnknownArchitectureError(
            f"no family describes checkpoints of model_type {model_type!r}",
            expected=suggest(model_type, known_families()),
            hint="CONTRIBUTING.md says how to add one: a table of tensor names in dynaconv/arch/families/",
        )
    declared = config.get("architectures") or []
    if declared and not set(declared) & set(family.architectures):
        raise CheckpointError(
            "the checkpoint is not a causal language model",
            where="architectures in config.json",
            expected=" or ".join(family.architectures),
            found=", ".join(map(str, declared)),
        )
    return family
