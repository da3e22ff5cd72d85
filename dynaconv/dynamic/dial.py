"""The dial: how much of a model a call may use. A value, not a mode. Ships with every exported model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dynaconv.dynamic.layout import DialTable, Layout
from dynaconv.frontier import check_budget, check_quality


@dataclass(frozen=True)
class Dial:
    """How much of the model to use: a budget, a quality, or one fixed width. Immutable; travels with the call.

    Turning it up never takes a block away from a token whose hidden state is the same.

    Attributes:
        budget: Mean active FFN share, in (0, 1]. 1 is the full dial: the parent's own function.
        quality: exp(parent loss - loss) to hold, above 0; turned into a budget by the measured frontier. Above 1
            where the model is better than its parent.
        width: The same number of blocks for every token, from 0; needs no calibration.

    Raises:
        ValueError: Not exactly one of the three is given, or it is out of its range.
    """

    budget: float | None = None
    quality: float | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("budget", "quality", "width") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a dial is one of budget, quality or width; given: {', '.join(given) or 'none'}")
        if self.budget is not None:
            check_budget(self.budget)
        if self.quality is not None:
            check_quality(self.quality)
        if self.width is not None and self.width < 0:
            raise ValueError(f"width {self.width} is negative")

    @classmethod
    def full(cls) -> Dial:
        """All blocks for all tokens: the parent's function."""
        return cls(budget=1.0)

    @classmethod
    def uniform(cls, width: int) -> Dial:
        """``width`` blocks for every token."""
        return cls(width=width)

    def __str__(self) -> str:
        if self.is_full:
            return "full"
        name = next(name for name in ("budget", "quality", "width") if getattr(self, name) is not None)
        return f"{name} {getattr(self, name):g}"

    @property
    def is_full(self) -> bool:
        """Whether every block is on whatever the calibration says."""
        return self.budget == 1.0

    def thresholds(self, layout: Layout) -> tuple[float, ...]:
        """The threshold of each of the L sites' routers; minus infinity at the full dial.

        Between two calibrated budgets thresholds are interpolated linearly, so they stay monotone in the dial.

        Raises:
            ValueError: The model has no calibrated dial, the budget lies below the lowest calibrated one, or no
                measured point reaches the quality.
        """
        budget = self.resolved(layout)
        if budget == 1.0:
            return (-math.inf,) * layout.layers
        return _interpolated(_calibrated(layout.dial), budget)

    def resolved(self, layout: Layout) -> float:
        """The budget that this dial means for the model of ``layout``.

        Raises:
            ValueError: It is a width, the model was not calibrated, or no measured point reaches the quality.
        """
        if self.budget is not None:
            return self.budget
        if self.quality is None:
            raise ValueError("a uniform width has no budget, and no router threshold")
        _calibrated(layout.dial)
        if layout.frontier is None:
            raise ValueError("this model has no measured frontier to find a quality on: run `dynaconv calibrate`")
        return layout.frontier.budget_for_quality(self.quality)


def _calibrated(table: DialTable | None) -> DialTable:
    if table is None:
        raise ValueError("this model has no calibrated dial: run `dynaconv calibrate`, or use Dial.uniform(width)")
    return table


def _interpolated(table: DialTable, budget: float) -> tuple[float, ...]:
    if budget < table.budgets[0]:
        raise ValueError(f"budget {budget:g} is below the lowest calibrated one, {table.budgets[0]:g}")
    right = sum(calibrated <= budget for calibrated in table.budgets)  # torch.compile cannot follow bisect
    if right == len(table.budgets):
        return table.thresholds[-1]
    low, high = table.budgets[right - 1], table.budgets[right]
    part = (budget - low) / (high - low)
    return tuple(a + part * (b - a) for a, b in zip(table.thresholds[right - 1], table.thresholds[right], strict=True))


DialLike = Dial | float | Sequence[Dial | float]


def as_dial(value: DialLike) -> Dial | tuple[Dial, ...]:
    """A number means a budget; a sequence means one dial a sequence of the batch."""
    if isinstance(value, Dial):
        return value
    if isinstance(value, (int, float)):
        return Dial(budget=float(value))
    return tuple(dial if isinstance(dial, Dial) else Dial(budget=float(dial)) for dial in value)
