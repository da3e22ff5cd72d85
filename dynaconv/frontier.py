"""The measured frontier: the file ``frontier.json``, and the rules that turn a quality or a FLOPs share into a budget.

Calibration measures the parent and the model at a grid of budgets. Between two measured budgets quality and costs are
taken to be linear in the budget. Ships with every exported model, so it imports nothing but the standard library.
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
UNITS = {
    "bytes": "the share of the parent's FFN bytes read for a token, routers included",
    "neurons": "the share of the FFN's neurons that are active, routers not counted",
}
"""What a budget is, by the unit that the file names."""


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
    """A budget or FLOPs share outside (0, 1], or a quality that is not above 0."""


class UnreachableError(FrontierError):
    """No measured point reaches the quality, or the budget or FLOPs share lies below the lowest measured one."""


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """What calibration measured at one budget, or of the parent. Shares are means over tokens and layers.

    Attributes:
        budget: Share of the parent's FFN bytes requested, in (0, 1].
        bytes_share: Share of the parent's FFN bytes read; routers and scales included.
        flops_share: Share of the parent's FFN FLOPs computed; routers included.
        active_share: Share of the neurons that are active, with exact or low-bit values; the others give their mean.
        exact_share: Share of the neurons whose values are exact, in the checkpoint's dtype.
        flops_per_token: FLOPs of one token's forward pass, routers included where they run.
        bytes_per_token: Bytes read for one token at batch 1, routers included where they run.
        loss: Nats a token on the scored text, all of it read at this budget.
        quality: exp(parent loss - loss); 1 is the parent's perplexity.
        agreement: Share of tokens whose most likely next token is the parent's.
        prompted_loss: Nats a token on the second half of each sequence, the first half of which was read at the full
            dial; ``None`` where it was not measured.
        prompted_quality: Quality against the parent's loss on the same tokens; ``None`` where it was not measured.
        tokens_per_s: Tokens generated a second at batch 1; ``None`` where speed was not measured.
        width_by_layer: Mean number of active blocks of each layer; empty for the parent.
    """

    budget: float
    bytes_share: float
    flops_share: float
    active_share: float
    exact_share: float
    flops_per_token: float
    bytes_per_token: float
    loss: float
    quality: float
    agreement: float
    prompted_loss: float | None = None
    prompted_quality: float | None = None
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
    """

    budget: float
    below: OperatingPoint
    above: OperatingPoint | None

    @property
    def quality(self) -> float:
        """That of ``below``, or linear between the two."""
        return self.interpolated("quality")

    def interpolated(self, name: str) -> float:
        """Field ``name`` of ``below``, or linear between the two points."""
        low = float(getattr(self.below, name))
        if self.above is None:
            return low
        part = (self.budget - self.below.budget) / (self.above.budget - self.below.budget)
        return low + part * (float(getattr(self.above, name)) - low)


@dataclass(frozen=True)
class Frontier:
    """Content of ``frontier.json``.

    Attributes:
        parent: The dense checkpoint, scored by the same code on the same text.
        points: What was measured, one or more points by ascending budget.
        scored_tokens: Tokens that were scored; ``None`` where the file does not say.
        unit: What a budget is, a key of :data:`UNITS`; earlier versions measured in neurons.
        router_bytes_share: Share of the parent's FFN bytes that routers read for every token, whatever the budget;
            ``None`` where the file does not say.

    Raises:
        DamagedFrontierError: There is no point, budgets do not ascend, or the unit is not known.
    """

    parent: OperatingPoint
    points: tuple[OperatingPoint, ...]
    scored_tokens: int | None = None
    unit: str = "bytes"
    router_bytes_share: float | None = None

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise DamagedFrontierError("the unit is not known", expected=" or ".join(UNITS), found=self.unit)
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

    def budget_for_flops(self, flops: float) -> float:
        """As :func:`budget_for_flops`, on these points."""
        return budget_for_flops(self.budgets, [point.flops_share for point in self.points], flops)

    @property
    def reads_low_bit_values(self) -> bool:
        """Whether some neurons are active with low-bit values at any of the points."""
        return any(point.active_share - point.exact_share > 1e-6 for point in self.points)  # more than rounding

    def at(self, budget: float) -> BudgetPosition:
        """Where ``budget`` lies among the measured points.

        Raises:
            InvalidRequestError: It is outside (0, 1].
            UnreachableError: It lies below the lowest measured one.
        """
        check_budget(budget)
        right = bisect_right(self.budgets, budget)
        if right == 0:
            raise self._below_the_lowest(budget)
        below = self.points[right - 1]
        measured = below.budget == budget or right == len(self.points)
        return BudgetPosition(budget, below, None if measured else self.points[right])

    def _below_the_lowest(self, budget: float) -> UnreachableError:
        """Says the lowest budget that can be asked for, and what keeps it from being lower."""
        lowest, routers = self.points[0], self.router_bytes_share
        expected, hint = None, f"budget {lowest.budget:g}"
        if self.unit == "bytes":
            read = "routers are" if routers is None else f"routers alone, {routers:.3g} of the parent's FFN bytes, are"
            expected = f"{lowest.budget:g} or more: the {read} read for every token, whatever the budget"
        if routers is None or budget > routers:
            hint += f"; calibrate.budgets=[{budget:g},...] measures lower ones"
        return UnreachableError(
            f"budget {budget:g} is below the lowest that was measured",
            expected=expected,
            found=f"the nearest is {lowest.budget:g} (quality {lowest.quality:.4f})",
            hint=hint,
        )

    @classmethod
    def from_json(cls, content: Any, *, where: object | None = None) -> Frontier:
        """Reads ``{"unit": ..., "parent": {...}, "frontier": [{...}, ...]}``. Fields it does not know are left out.

        A file without a unit is of an earlier version: its budgets and shares are of neurons.

        Args:
            content: What the file holds.
            where: The file, for error messages.

        Raises:
            DamagedFrontierError: A field is missing or is not what it should be.
        """
        try:
            dense, unit, routers = content["parent"], content.get("unit", "neurons"), content.get("router_bytes_share")
            read = _read_old_point if unit == "neurons" else _read_point
            points = sorted(map(read, content["frontier"]), key=lambda point: point.budget)
            return cls(
                parent=_read_point({**_parent_shares(dense), **dense}),
                points=tuple(points),
                scored_tokens=dense.get("scored_tokens"),
                unit=unit,
                router_bytes_share=None if routers is None else _number(routers, "router_bytes_share"),
            )
        except FrontierError as error:
            raise DamagedFrontierError(
                error.what, where=where, expected=error.expected, found=error.found, hint=error.hint
            ) from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            found = f"no {error}" if isinstance(error, KeyError) else error
            raise DamagedFrontierError(
                "the frontier cannot be read", where=where, found=found, hint="run `dynaconv calibrate` again"
            ) from error

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        measured = ("loss", "perplexity", "prompted_loss", "flops_per_token", "bytes_per_token", "tokens_per_s")
        parent = {name: getattr(self.parent, name) for name in measured}
        points = [{**asdict(point), "width_by_layer": list(point.width_by_layer)} for point in self.points]
        return {
            "unit": self.unit,
            "router_bytes_share": self.router_bytes_share,
            "parent": {**parent, "scored_tokens": self.scored_tokens},
            "frontier": points,
        }

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
        Path(path).write_text(json.dumps(self.to_json(), indent=1, sort_keys=True) + "\n", encoding="utf-8")


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


def budget_for_flops(budgets: Sequence[float], flops_shares: Sequence[float], flops: float) -> float:
    """The highest budget whose FLOPs share, linear between measured points, is at most ``flops``.

    Args:
        budgets: Measured budgets, ascending.
        flops_shares: Share of the parent's FFN FLOPs at each of them. Need not rise with the budget: at the full dial
            no router runs.
        flops: The share to spend at most, in (0, 1].

    Raises:
        InvalidRequestError: ``flops`` is outside (0, 1].
        UnreachableError: Every point costs more. Names the one that costs least.
    """
    check_flops(flops)
    if flops_shares[-1] <= flops:
        return budgets[-1]
    for index in range(len(budgets) - 1, 0, -1):
        (low, high), (cheaper, dearer) = budgets[index - 1 : index + 1], flops_shares[index - 1 : index + 1]
        if cheaper <= flops:  # and the dearer is above it
            return min(high, low + (high - low) * (flops - cheaper) / (dearer - cheaper))
    least = min(range(len(budgets)), key=lambda index: flops_shares[index])
    raise UnreachableError(
        f"no point costs as little as {flops:g} of the parent's FFN FLOPs",
        expected="a share that pays for the routers, which run for every token",
        found=f"the lowest is {flops_shares[least]:.4f}, at budget {budgets[least]:g}",
        hint=f"a FLOPs share of {math.ceil(flops_shares[least] * 10_000) / 10_000:g}",
    )


def check_budget(budget: float) -> None:
    """Raises :class:`InvalidRequestError` for a budget outside (0, 1]."""
    _check_share("budget", budget, "the share of the parent's FFN bytes to read, such as 0.5")


def check_flops(flops: float) -> None:
    """Raises :class:`InvalidRequestError` for a share of FLOPs outside (0, 1]."""
    _check_share("FLOPs share", flops, "the share of the parent's FFN FLOPs to compute, such as 0.5")


def _check_share(name: str, share: float, expected: str) -> None:
    if not 0 < share <= 1:
        raise InvalidRequestError(f"{name} {share:g} is outside (0, 1]", expected=expected)


def check_quality(quality: float) -> None:
    """Raises :class:`InvalidRequestError` for a quality that is not above 0."""
    if not 0 < quality < math.inf:
        expected = "a share of the parent's, such as 0.98"
        raise InvalidRequestError(f"quality {quality:g} is not above 0", expected=expected)


def _parent_shares(content: Mapping[str, Any]) -> dict[str, float | None]:
    """What the file does not say of the parent, because it is 1."""
    names = ("budget", "bytes_share", "flops_share", "active_share", "exact_share", "quality", "agreement")
    prompted = None if content.get("prompted_loss") is None else 1.0
    return {**dict.fromkeys(names, 1.0), "prompted_quality": prompted}


def _read_point(content: Mapping[str, Any]) -> OperatingPoint:
    """One point of the file; a ``ValueError`` says what is wrong with it."""
    values: dict[str, Any] = {}
    for name in (field.name for field in fields(OperatingPoint)):
        if name == "width_by_layer":
            values[name] = tuple(_number(width, name) for width in content.get(name, ()))
        elif name in ("prompted_loss", "prompted_quality", "tokens_per_s"):
            values[name] = None if content.get(name) is None else _number(content[name], name)
        else:
            values[name] = _number(content[name], name)
    if not 0 < values["budget"] <= 1:
        raise ValueError(f"budget {values['budget']:g} is outside (0, 1]")
    return OperatingPoint(**values)


def _read_old_point(content: Mapping[str, Any]) -> OperatingPoint:
    """A point of an earlier version, whose shares of cost are taken to be that of neurons."""
    shares = dict.fromkeys(("bytes_share", "flops_share", "exact_share"), content["active_share"])
    return _read_point({**shares, **content})


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, not a number")
    return value


def _round_down(quality: float) -> str:
    """``quality`` cut to four digits, so that asking for what is printed succeeds."""
    return f"{int(quality * 10_000) / 10_000:g}"
