"""From JSON to dataclasses, with the type of every field checked: a damaged or hostile file ends in one clear error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from dynaconv.errors import ArtifactError

MOST_NESTED = 50  # lists and objects within each other: what is copied and printed recursively must come to an end
LARGEST = 10**300  # of whole numbers, so that they can be divided and printed as floats
SHOWN = 200  # characters of a wrong value
PLAIN: dict[type, str] = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
T = TypeVar("T")


@dataclass(frozen=True)
class JsonFile:
    """A JSON file that is being read, and what to say when it is wrong.

    Attributes:
        path: The file.
        what: What a wrong field means, one sentence.
        hint: What to do then.
    """

    path: Path
    what: str
    hint: str

    def wrong(self, field: str, expected: str, found: object) -> ArtifactError:
        """The error for a wrong ``field``, named by its place in the file: ``stages[0].folder``."""
        shown = repr(found)
        shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
        where = f"{self.path}, field {field}" if field else self.path
        return ArtifactError(self.what, where=where, expected=expected, found=shown, hint=self.hint)

    def record(self, kind: type[T], value: object, field: str = "") -> T:
        """``value`` as a dataclass of type ``kind``.

        Args:
            kind: A dataclass whose fields are plain values, lists, objects, other dataclasses, or one of these or
                ``None``.
            value: What stands at ``field``.
            field: Its place in the file; empty for the whole content.

        Raises:
            ArtifactError: A field is missing, unknown or of another type.
        """
        types = get_type_hints(kind)
        fields = dataclasses.fields(cast(Any, kind))
        known = f"an object with {', '.join(item.name for item in fields)}"
        if not isinstance(value, dict):
            raise self.wrong(field, known, value)
        required = {item.name for item in fields if item.default is item.default_factory is dataclasses.MISSING}
        for name in (*(required - value.keys()), *(value.keys() - types.keys())):
            raise self.wrong(
                _join(field, name), known, "a field that is not known" if name in value else "no such field"
            )
        return kind(**{name: self._typed(types[name], item, _join(field, name)) for name, item in value.items()})

    def _typed(self, kind: Any, value: object, field: str) -> Any:
        origin, arguments = get_origin(kind), get_args(kind)
        if kind is Any:
            self._check_any(value, field, MOST_NESTED)
            return value
        if dataclasses.is_dataclass(kind):
            return self.record(cast(type, kind), value, field)
        if origin is UnionType:
            return None if value is None else self._typed(arguments[0], value, field)
        if origin in (list, tuple):
            if not isinstance(value, list):
                raise self.wrong(field, "a list", value)
            return origin(self._typed(arguments[0], item, f"{field}[{i}]") for i, item in enumerate(value))
        if origin in (dict, Mapping):
            if not isinstance(value, dict):
                raise self.wrong(field, "an object", value)
            return {name: self._typed(arguments[1], item, _join(field, name)) for name, item in value.items()}
        return self._plain(kind, value, field)

    def _plain(self, kind: type, value: object, field: str) -> object:
        allowed = (int, float) if kind is float else (kind,)
        if type(value) not in allowed:  # a bool is no number here
            raise self.wrong(field, PLAIN[kind], value)
        if isinstance(value, (int, float)) and not (math.isfinite(value) if kind is float else abs(value) < LARGEST):
            raise self.wrong(field, "a finite number", value)
        return value

    def _check_any(self, value: object, field: str, nested: int) -> None:
        """Stops at values that nothing here writes and that would overflow what reads them."""
        if type(value) is int and abs(value) >= LARGEST:
            raise self.wrong(field, "a finite number", value)
        if isinstance(value, (dict, list)):
            if nested == 0:
                raise self.wrong(field, f"at most {MOST_NESTED} lists and objects within each other", "more")
            for name, item in value.items() if isinstance(value, dict) else enumerate(value):
                self._check_any(item, _join(field, str(name)), nested - 1)


def _join(field: str, name: str) -> str:
    """Place of the field ``name`` of the object at ``field``."""
    shown = name if name.isprintable() and len(name) <= SHOWN else ascii(name[:SHOWN])
    return f"{field}.{shown}" if field else shown
