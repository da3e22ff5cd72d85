"""One error tree: what failed, where, what was expected, what was found, what to do next.

Every mistake a user can cause ends in one of these, printed as one message and turned into an exit code by the CLI.
Exit codes: 2 usage or configuration, 3 a missing, stale or damaged artifact, 4 a quality gate, 5 an export check.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class DynaconvError(Exception):
    """Base of all errors that dynaconv raises on purpose.

    Args:
        what: What failed, one sentence.
        where: The stage, layer, tensor or file it failed at.
        expected: What should have been there.
        found: What was there.
        hint: What to do next.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: object | None = None,
        expected: object | None = None,
        found: object | None = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.found, self.hint = what, where, expected, found, hint
        parts = [("where", where), ("expected", expected), ("found", found), ("try", hint)]
        lines = [what, *(f"  {label}: {value}" for label, value in parts if value is not None)]
        super().__init__("\n".join(lines))


class ConfigError(DynaconvError):
    """A recipe, an override or an option is wrong. Lists every mistake at once when given ``problems``."""

    exit_code = 2

    @classmethod
    def from_problems(cls, problems: Sequence[str], *, where: object | None = None) -> ConfigError:
        """One error for all ``problems``, each on its own line."""
        if len(problems) == 1:
            return cls(problems[0], where=where)
        listed = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(problems, 1))
        return cls(f"{len(problems)} mistakes in the configuration\n{listed}", where=where)


class DataError(DynaconvError):
    """Calibration or training text is missing, empty, too small or lacks a field."""

    exit_code = 2


class ArtifactError(DynaconvError):
    """A file dynaconv needs is missing, damaged, of the wrong kind or cannot be written."""

    exit_code = 3


class CheckpointError(ArtifactError):
    """A model checkpoint cannot be used: no config, pickle only, truncated shard, wrong shape, NaN in weights."""


class UnknownArchitectureError(CheckpointError):
    """The checkpoint's ``model_type`` has no family file."""


class StaleArtifactError(ArtifactError):
    """A stage's recorded result was made from something else than what is asked for now."""


class LockedRunError(ArtifactError):
    """Another process is working on this run."""


class QualityError(DynaconvError):
    """A quality or budget that was asked for cannot be reached."""

    exit_code = 4


class ExportError(DynaconvError):
    """The exported model does not do what the converted one does, or the target cannot hold it."""

    exit_code = 5


def suggest(name: str, known: Iterable[str]) -> str:
    """``"did you mean X? "`` for the nearest of ``known``, and the list; for the end of an error message."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return (f"did you mean {near[0]!r}? " if near else "") + f"available: {', '.join(names)}"
