"""The measured frontier: the file ``frontier.json``, and the one rule that turns a quality into a budget.

Calibration measures the parent and the model at a grid of budgets. Between two measured budgets quality is taken to be
linear in the budget. Ships with every exported model, so it imports nothing but the standard library.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FRONTIER_FILE = "frontier.json"
PICTURE_FILE = "frontier.png"


class FrontierError(ValueError):
    """Base of the errors raised here.

    Args:
        what: What failed, one sentence.
        where: The file it failed at.
        expected: What should have been there.
        found: What was there.
        hint: What to do next.
    """

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
        super().__init__("; ".join([what, *(f"{label}: {part}" for label, part in parts if part is not None)]))


class DamagedFrontierError(FrontierError):
    """A frontier lacks something, or holds what cannot have been measured."""


class InvalidRequestError(FrontierError):
    """A budget outside (0, 1], or a quality that is not above 0."""


class UnreachableError(FrontierError):
    """No measured point reaches the quality, or the budget lies below the lowest measured one."""


@dataclass(frozen=True)
class OperatingPoint:
    """What calibration measured at one budget, or of the parent.

    Attributes:
        budget: Active FFN share requested, in (0, 1].
        active_share: Active FFN share spent.
        flops_per_token: FLOPs of one token's forward pass, routers included where they run.
        bytes_per_token: Bytes read for one token at batch 1, routers included where they run.
        loss: Nats a token on the scored text.
        quality: exp(parent loss - loss); 1 is the parent's perplexity.
        agreement: Share of tokens whose most likely next token is the parent's.
        tokens_per_s: Tokens generated a second at batch 1; ``None`` where speed was not measured.
        width_by_layer: Mean number of active blocks of each layer; empty for the parent.
    """

    budget: float
    active_share: float
    flops_per_token: float
    bytes_per_token: float
    loss: float
    quality: float
    agreement: float
    tokens_per_s: float | None = None
    width_by_layer: tuple[float, ...] = ()

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


@dataclass(frozen=True)
class BudgetPosition:
    """Where a budget lies among the measured points.

    Attributes:
        budget: The budget.
        below: The measured point at the budget, or else the next lower one.
        above: The next higher one; ``None`` where the budget was measured, or lies above all that were.
        quality: That of ``below``, or linear between the two.
    """

    budget: float
    below: OperatingPoint
    above: OperatingPoint | None
    quality: float


@dataclass(frozen=True)
class Frontier:
    """Content of ``frontier.json``.

    Attributes:
        parent: The dense checkpoint, scored by the same code on the same text.
        points: What was measured, one or more points by ascending budget.
        scored_tokens: Tokens that were scored; ``None`` where the file does not say.

    Raises:
        DamagedFrontierError: There is no point, or budgets do not ascend.
    """

    parent: OperatingPoint
    points: tuple[OperatingPoint, ...]
    scored_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.points:
            raise DamagedFrontierError("the frontier is empty", hint="run `dynaconv calibrate`")
        budgets = self.budgets
        if list(budgets) != sorted(set(budgets)):
            raise DamagedFrontierError("the budgets of the frontier do not ascend", found=budgets)

    @property
    def budgets(self) -> tuple[float, ...]:
        """The measured budgets, ascending."""
        return tuple(point.budget for point in self.points)

    def budget_for_quality(self, quality: float) -> float:
        """As :func:`budget_for_quality`, on these points."""
        return budget_for_quality(self.budgets, [point.quality for point in self.points], quality)

    def at(self, budget: float) -> BudgetPosition:
        """Where ``budget`` lies among the measured points.

        Raises:
            InvalidRequestError: It is outside (0, 1].
            UnreachableError: It lies below the lowest measured one.
        """
        check_budget(budget)
        right = bisect_right(self.budgets, budget)
        if right == 0:
            lowest = self.points[0]
            raise UnreachableError(
                f"budget {budget:g} is below the lowest that was measured",
                found=f"the nearest is {lowest.budget:g} (quality {lowest.quality:.4f})",
                hint=f"calibrate.budgets=[{budget:g},...] measures lower ones",
            )
        below = self.points[right - 1]
        if below.budget == budget or right == len(self.points):
            return BudgetPosition(budget, below, None, below.quality)
        above = self.points[right]
        part = (budget - below.budget) / (above.budget - below.budget)
        return BudgetPosition(budget, below, above, below.quality + part * (above.quality - below.quality))

    @classmethod
    def from_json(cls, content: Any, *, where: object | None = None) -> Frontier:
        """Reads ``{"parent": {...}, "frontier": [{...}, ...]}``. Fields it does not know are left out.

        Args:
            content: What the file holds.
            where: The file, for error messages.

        Raises:
            DamagedFrontierError: A field is missing or is not what it should be.
        """
        try:
            defaults = {"budget": 1.0, "active_share": 1.0, "quality": 1.0, "agreement": 1.0}
            parent = _read_point({**defaults, **content["parent"]})
            points = sorted(map(_read_point, content["frontier"]), key=lambda point: point.budget)
            return cls(parent, tuple(points), content["parent"].get("scored_tokens"))
        except FrontierError as error:
            raise DamagedFrontierError(error.what, where=where, found=error.found, hint=error.hint) from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            found = f"no {error}" if isinstance(error, KeyError) else error
            raise DamagedFrontierError(
                "the frontier cannot be read", where=where, found=found, hint="run `dynaconv calibrate` again"
            ) from error

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        measured = ("loss", "perplexity", "flops_per_token", "bytes_per_token", "tokens_per_s")
        parent = {name: getattr(self.parent, name) for name in measured}
        points = [{**asdict(point), "width_by_layer": list(point.width_by_layer)} for point in self.points]
        return {"parent": {**parent, "scored_tokens": self.scored_tokens}, "frontier": points}

    @classmethod
    def load(cls, path: str | Path) -> Frontier:
        """Reads ``frontier.json``.

        Raises:
            DamagedFrontierError: The file is missing or cannot be read.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DamagedFrontierError(
                "the frontier is missing", where=path, hint="run `dynaconv calibrate`"
            ) from error
        except ValueError as error:
            raise DamagedFrontierError("the frontier is not valid JSON", where=path, found=error) from error
        return cls.from_json(content, where=path)

    def save(self, path: str | Path) -> None:
        """Writes ``frontier.json``."""
        text = json.dumps(self.to_json(), indent=1, sort_keys=True)
        Path(path).write_text(text + "\n", encoding="utf-8")


def budget_for_quality(budgets: Sequence[float], qualities: Sequence[float], quality: float) -> float:
    """The lowest budget whose quality, linear between measured points, is at least ``quality``.

    Args:
        budgets: Measured budgets, ascending.
        qualities: exp(parent loss - loss) at each of them. Need not rise with the budget.
        quality: The quality to hold, above 0; above 1 where the model is better than its parent.

    Raises:
        InvalidRequestError: ``quality`` is not above 0.
        UnreachableError: No point reaches it. Names the best one.
    """
    check_quality(quality)
    if qualities[0] >= quality:
        return budgets[0]
    for index in range(1, len(budgets)):
        (low, high), (worse, better) = budgets[index - 1 : index + 1], qualities[index - 1 : index + 1]
        if better == quality:
            return high  # exactly, whatever the division below would round it to
        if better > quality:
            return min(high, low + (high - low) * (quality - worse) / (better - worse))
    best = max(range(len(budgets)), key=lambda index: qualities[index])
    raise UnreachableError(
        f"no point reaches quality {quality:g}",
        found=f"the nearest is {qualities[best]:.4f}, at budget {budgets[best]:g}",
        hint=f"quality {_round_down(qualities[best])}, or fine-tune longer",
    )


def check_budget(budget: float) -> None:
    """Raises :class:`InvalidRequestError` for a budget outside (0, 1]."""
    if not 0 < budget <= 1:
        expected = "the share of the FFN to use, such as 0.5"
        raise InvalidRequestError(f"budget {budget:g} is outside (0, 1]", expected=expected)


def check_quality(quality: float) -> None:
    """Raises :class:`InvalidRequestError` for a quality that is not above 0."""
    if not 0 < quality < math.inf:
        expected = "a share of the parent's, such as 0.98"
        raise InvalidRequestError(f"quality {quality:g} is not above 0", expected=expected)


def _read_point(content: Mapping[str, Any]) -> OperatingPoint:
    """One point of the file; a ``ValueError`` says what is wrong with it."""
    values: dict[str, Any] = {}
    for name in (field.name for field in fields(OperatingPoint)):
        if name == "width_by_layer":
            values[name] = tuple(_number(width, name) for width in content.get(name, ()))
        elif name == "tokens_per_s":
            values[name] = None if content.get(name) is None else _number(content[name], name)
        else:
            values[name] = _number(content[name], name)
    if not 0 < values["budget"] <= 1:
        raise ValueError(f"budget {values['budget']:g} is outside (0, 1]")
    return OperatingPoint(**values)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, not a number")
    return value


def _round_down(quality: float) -> str:
    """``quality`` cut to four digits, so that asking for what is printed succeeds."""
    return f"{int(quality * 10_000) / 10_000:g}"
