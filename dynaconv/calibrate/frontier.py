"""The measured frontier, and the point of it that a budget or a quality asks for.

Only measured points are chosen. The dial of a model also follows budgets between two of them, by interpolating router
levels; what that costs and scores lies between what was measured at the neighbours, which :class:`Choice` names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dynaconv.errors import ArtifactError, ConfigError, QualityError

FRONTIER_FILE = "frontier.json"
PICTURE_FILE = "frontier.png"


@dataclass(frozen=True)
class OperatingPoint:
    """What calibration measured at one setting of the dial.

    Attributes:
        budget: Active FFN share asked for, in (0, 1].
        active_share: Active FFN share spent.
        flops_per_token: FLOPs of one token's forward pass, routers included.
        bytes_per_token: Bytes of weights read for one token at batch 1, routers included.
        loss: Nats a token on the scored text.
        quality: exp(parent loss - loss); 1 is the parent's perplexity.
        agreement: Share of tokens whose most likely next token is the parent's.
        tokens_per_s: Tokens generated a second at batch 1; ``None`` where speed was not measured.
    """

    budget: float
    active_share: float
    flops_per_token: float
    bytes_per_token: float
    loss: float
    quality: float
    agreement: float
    tokens_per_s: float | None = None


@dataclass(frozen=True)
class Frontier:
    """The parent and the points, by ascending budget.

    Attributes:
        parent: The dense checkpoint, scored by the same code on the same text.
        points: What was measured along the dial.
    """

    parent: OperatingPoint
    points: tuple[OperatingPoint, ...]

    @classmethod
    def from_json(cls, content: Mapping[str, Any], *, where: object | None = None) -> Frontier:
        """Reads ``{"parent": {...}, "frontier": [{...}, ...]}``; fields it does not know are left out.

        Raises:
            ArtifactError: A field is missing.
        """
        try:
            points = [_point(point) for point in content["frontier"]]
            parent = _point({"budget": 1.0, "active_share": 1.0, "quality": 1.0, "agreement": 1.0, **content["parent"]})
        except (KeyError, TypeError) as error:
            raise ArtifactError(
                "the frontier cannot be read", where=where, found=error, hint="run `dynaconv calibrate` again"
            ) from error
        if not points:
            raise ArtifactError("the frontier is empty", where=where, hint="run `dynaconv calibrate`")
        return cls(parent, tuple(sorted(points, key=lambda point: point.budget)))


def _point(content: Mapping[str, Any]) -> OperatingPoint:
    return OperatingPoint(**{field.name: content[field.name] for field in fields(OperatingPoint)})


@dataclass(frozen=True)
class Choice:
    """A point of the frontier and the dial that was asked for.

    Attributes:
        point: The measured point.
        budget: Where the dial goes: the budget asked for, or the point's own.
        above: The next measured point, where ``budget`` lies between the two; ``None`` where it is on ``point``.
    """

    point: OperatingPoint
    budget: float
    above: OperatingPoint | None = None


def check_budget(budget: float) -> None:
    """Raises :class:`ConfigError` for a budget outside (0, 1]."""
    if not 0 < budget <= 1:
        raise ConfigError(f"budget {budget:g} is outside (0, 1]", expected="the share of the FFN to use, such as 0.5")


def check_quality(quality: float) -> None:
    """Raises :class:`ConfigError` for a quality that is not above 0."""
    if not quality > 0:
        raise ConfigError(f"quality {quality:g} is not above 0", expected="a share of the parent's, such as 0.98")


def select_by_budget(points: Sequence[OperatingPoint], budget: float) -> Choice:
    """The most that ``budget`` pays for: the largest measured budget that is no larger.

    Args:
        points: By ascending budget.
        budget: Active FFN share, in (0, 1].

    Raises:
        ConfigError: ``budget`` is outside (0, 1].
        QualityError: It lies below the lowest measured one.
    """
    check_budget(budget)
    paid = [point for point in points if point.budget <= budget]
    if not paid:
        raise QualityError(
            f"budget {budget:g} is below the lowest that was measured",
            found=f"the nearest is {points[0].budget:g} (quality {points[0].quality:.4f})",
            hint=f"calibrate.budgets=[{budget:g},...] measures lower ones",
        )
    above = next((point for point in points if point.budget > budget), None)
    point = paid[-1]
    return Choice(point, budget, above if point.budget < budget else None)


def select_by_quality(points: Sequence[OperatingPoint], quality: float) -> Choice:
    """The cheapest measured point that holds ``quality``.

    Args:
        points: By ascending budget.
        quality: exp(parent loss - loss) to hold, above 0; 1 is the parent's perplexity.

    Raises:
        ConfigError: ``quality`` is not above 0.
        QualityError: No point reaches it; says which comes nearest.
    """
    check_quality(quality)
    holding = [point for point in points if point.quality >= quality]
    if not holding:
        best = max(points, key=lambda point: point.quality)
        raise QualityError(
            f"no point reaches quality {quality:g}",
            found=f"the nearest is {best.quality:.4f}, at budget {best.budget:g}",
            hint=f"--quality {_floor(best.quality)}, or fine-tune longer",
        )
    point = min(holding, key=lambda point: (point.flops_per_token, point.budget))
    return Choice(point, point.budget)


def _floor(quality: float) -> str:
    """``quality`` cut, not rounded, to four digits, so that asking for what is printed succeeds."""
    return f"{int(quality * 10_000) / 10_000:g}"
