"""``recipe.yaml``: the resolved recipe of a run, good from any folder."""

from __future__ import annotations

import glob
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from dynaconv.config import RunConfig


def settled(config: RunConfig) -> RunConfig:
    """``config`` with local paths made absolute; names of datasets and of models on the hub stay as they are."""
    train = [_absolute(spec) for spec in config.data.train]
    validation = None if config.data.validation is None else [_absolute(spec) for spec in config.data.validation]
    data = replace(config.data, train=train, validation=validation)
    return replace(config, source=_absolute(config.source), data=data)


def recipe_text(config: RunConfig) -> str:
    """``config`` as YAML that reads back as it is: ``${`` in a value is no interpolation."""
    return yaml.safe_dump(_escaped(asdict(config)), sort_keys=False, allow_unicode=True)


def _absolute(spec: str) -> str:
    path = Path(spec).expanduser()
    return str(path.absolute()) if spec and (path.exists() or glob.has_magic(spec)) else spec


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _escaped(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
