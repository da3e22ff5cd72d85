"""``KEY=VALUE`` on the command line and the keys of a recipe, checked against the schema before anything runs.

Values follow hydra's grammar, except text: a path may hold spaces, ``=``, brackets and quotes, so the value of a text
field is taken as it stands. ``data=PATH|NAME[,...]`` is short for ``data.train=[...]``.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaconv.config import RunConfig
from dynaconv.errors import suggest

if TYPE_CHECKING:
    from omegaconf import DictConfig

SHORTHANDS = {"data": "data.train"}
TYPE_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[str]: "a list, such as [first,second]",
    list[float]: "a list of numbers, such as [0.25,0.5]",
}


def parse(texts: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Values by dotted key, and every mistake in ``texts``, one sentence each."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for text in texts:
        given, equals, raw = text.partition("=")
        key = SHORTHANDS.get(given.lstrip("+").strip(), given.lstrip("+").strip())
        if not equals or not key:
            problems.append(f"{text!r} is not KEY=VALUE, such as block_size=32 or data=my/text.txt")
        elif wrong := unknown_key(key):
            problems.append(wrong)
        elif key in values:
            problems.append(f"{key} is given twice ({text!r} is the second)")
        else:
            try:
                values[key] = _value(key, raw.strip())
            except ValueError as error:
                problems.append(str(error))
    return values, problems


def _value(key: str, raw: str) -> Any:
    """Reads ``raw`` as what field ``key`` is: text as it stands, everything else by hydra's grammar."""
    hint, optional = schema()[key]
    if hint in (str, list[str]) and not (optional and raw == "null"):
        literal = Path(raw).expanduser().exists()
        if hint is str and (literal or raw[:1] not in ("'", '"')):
            return _as_text(raw)
        if hint == list[str] and (literal or raw[:1] != "["):
            items = [raw] if literal else raw.split(",")
            return [_as_text(item.strip()) for item in items]
    return _hydra_value(key, raw)


def _hydra_value(key: str, raw: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    hint, optional = schema()[key]
    wanted = TYPE_WORDS[hint] + (" or null" if optional else "")
    try:
        override = OverridesParser.create().parse_override(f"{key}={raw}")
    except HydraException:
        raise ValueError(f"{key} is {raw!r}; it must be {wanted}") from None
    if override.is_sweep_override():
        raise ValueError(f"{key} is {raw!r}, several values; it must be {wanted}")
    return override.value()


def _as_text(raw: str) -> str:
    """``raw`` as it stands, but for a leading ``~``, which shells leave alone after ``=``."""
    return str(_escape(str(Path(raw).expanduser()) if raw.startswith("~/") else raw))


def _escape(value: Any) -> Any:
    """Keeps ``${`` in plain text from being read as an interpolation."""
    if isinstance(value, list):
        return [_escape(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


@cache
def schema() -> Mapping[str, tuple[Any, bool]]:
    """Type of every field of :class:`RunConfig` by dotted name, and whether it may be null."""
    return types.MappingProxyType(dict(_fields(RunConfig, "")))


def _fields(section: type, prefix: str) -> Iterator[tuple[str, tuple[Any, bool]]]:
    for name, hint in typing.get_type_hints(section).items():
        if is_dataclass(hint):
            yield from _fields(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            plain = [member for member in members if member is not type(None)]
            yield prefix + name, (plain[0], len(members) > len(plain))


def _is_section(key: str) -> bool:
    return any(name.startswith(key + ".") for name in schema())


def unknown_key(key: str) -> str | None:
    """What is wrong with ``key``, with the nearest name and the names at its level; ``None`` when it is a field."""
    names = schema()
    if key in names:
        return None
    if _is_section(key):
        first = next(name for name in names if name.startswith(key + "."))
        return f"{key} is a section; set one of its fields, such as {first}"
    section, last = "", key
    for part in key.split("."):
        if not _is_section(section + part):
            last = part
            break
        section += f"{part}."
    elsewhere = [name for name in names if name.split(".")[-1] == last]
    if elsewhere:
        return f"unknown key {key!r}: did you mean {' or '.join(elsewhere)}?"
    level = dict.fromkeys(name.removeprefix(section).split(".")[0] for name in names if name.startswith(section))
    where = f" in {section[:-1]}" if section else ""
    return f"unknown key {key!r}: no {last!r}{where}; {suggest(last, level)}"


def flatten(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def assign(config: DictConfig, content: Mapping[Any, Any]) -> list[str]:
    """Sets the fields of ``config`` (a structured :class:`RunConfig`) from ``content``; returns every mistake."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    problems = []
    for key, value in flatten(content):
        if wrong := unknown_key(key):
            if value is not None or not _is_section(key):  # a section whose fields are all commented out is empty
                problems.append(wrong)
            continue
        hint, optional = schema()[key]
        try:
            OmegaConf.update(config, key, _escape(_as_meant(value, hint)))
        except OmegaConfBaseException:
            wanted = TYPE_WORDS[hint] + (" or null" if optional else "")
            problems.append(f"{key} is {value!r}; it must be {wanted}")
    return problems


def _as_meant(value: Any, hint: Any) -> Any:
    """``2e6`` for a whole number, one name for a list of names, and YAML's ``off`` for a word."""
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint == list[str] and isinstance(value, str):
        return [value]
    if hint is str and isinstance(value, bool):  # YAML 1.1 reads on and off as true and false
        return "on" if value else "off"
    return value
