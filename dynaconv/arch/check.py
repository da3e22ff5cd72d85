"""Compares a family's table with the tensors that a checkpoint really holds, and reports every difference at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Protocol

from dynaconv.arch.spec import Family, Slot

FLOAT_DTYPES = ("torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Stored(Protocol):
    """What is known of a stored tensor without reading it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> object:
        """Its torch dtype."""


def ignored(family: Family, name: str) -> bool:
    """Whether ``name`` is a leftover that no model of ``family`` reads."""
    return any(fnmatchcase(name, pattern) for pattern in family.ignored)


def mismatches(family: Family, slots: Mapping[str, Slot], stored: Mapping[str, Stored], *, tied: bool) -> list[str]:
    """Every difference between what must be there and what is, one sentence each, like ones grouped over layers.

    Args:
        family: The architecture.
        slots: What :meth:`Family.slots` expects.
        stored: What the checkpoint holds, by name.
        tied: Whether a stored copy of a tied tensor is allowed.
    """
    found: list[tuple[str, str]] = []
    for name, slot in slots.items():
        if name not in stored:
            found.append((name, f"missing, expected shape {_shape(slot.shape)}"))
        elif tuple(stored[name].shape) != slot.shape:
            axes = " x ".join(slot.spec.axes)
            shape = _shape(stored[name].shape)
            found.append((name, f"has shape {shape}, config.json says {_shape(slot.shape)} ({axes})"))
        elif str(stored[name].dtype) not in FLOAT_DTYPES:
            found.append((name, f"is {stored[name].dtype}, expected a plain floating-point type"))
    allowed = set(family.ties) if tied else set()
    for name in stored:
        if name not in slots and name not in allowed and not ignored(family, name):
            found.append((name, f"unexpected, not part of a {family.model_type} model with this config.json"))
    return _grouped(found)


def _shape(shape: Iterable[int]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _grouped(found: list[tuple[str, str]]) -> list[str]:
    """``model.layers.{layer}.x: missing (layers 0-31)`` instead of 32 lines."""
    groups: dict[tuple[str, str], list[tuple[str, int | None]]] = {}
    for name, message in found:
        number = _NUMBER.search(name)
        pattern = name if number is None else f"{name[: number.start()]}{{layer}}{name[number.end() :]}"
        groups.setdefault((pattern, message), []).append((name, int(number.group()) if number else None))
    lines = []
    for (pattern, message), members in groups.items():
        layers = sorted(layer for _, layer in members if layer is not None)
        if len(layers) < 2:
            lines.append(f"{members[0][0]}: {message}")
        else:
            lines.append(f"{pattern}: {message} (layers {_ranges(layers)})")
    return lines


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
