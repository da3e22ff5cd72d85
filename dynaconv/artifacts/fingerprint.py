"""Identity of a result: a hash over everything it depends on, and the names of what differs between two."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

HEX_SHOWN = 12
ABSENT = "(absent)"


def fingerprint(fields: Mapping[str, Any]) -> str:
    """Hex SHA-256 over the canonical JSON of ``fields``: sorted keys, no spaces, shortest exact numbers.

    Raises:
        TypeError: A value that JSON cannot hold.
        ValueError: NaN or infinity.
    """
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of all leaves of a dataclass or nested mapping; lists are leaves, tuples become lists."""
    content = asdict(config) if is_dataclass(config) and not isinstance(config, type) else config
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One ``"field: old -> new"`` for each field that differs, in order of names; long hashes are cut short."""
    pairs = [(name, old.get(name, ABSENT), new.get(name, ABSENT)) for name in sorted({*old, *new})]
    # As JSON, not with ==, for which 1, 1.0 and true are one value: the hash tells them apart.
    differing = [(name, then, now) for name, then, now in pairs if json.dumps(then) != json.dumps(now)]
    return [f"{name}: {_shown(then)} -> {_shown(now)}" for name, then, now in differing]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    head, _, tail = text.rpartition(":")
    is_hash = len(tail) == hashlib.sha256().digest_size * 2 and all(char in "0123456789abcdef" for char in tail)
    return f"{head}:{tail[:HEX_SHOWN]}".removeprefix(":") if is_hash else text
