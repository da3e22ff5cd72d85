"""Keeps the mean share that steps spend at the mean share they ask for."""

from __future__ import annotations

from dataclasses import dataclass

GAIN = 0.2  # of the integral term
LOWEST = 0.01  # a share that still has a threshold


@dataclass
class BudgetController:
    """An integral controller of the active share.

    Thresholds are solved on scores of the full dial, but at a lower dial the hidden states, and so the scores, differ.

    Attributes:
        error: Sum of share spent minus share asked over the steps so far, times the gain. A request is lowered by it.
    """

    error: float = 0.0

    def request(self, budget: float) -> float:
        """The share to solve a threshold for, so that ``budget`` is spent."""
        return min(1.0, max(LOWEST, budget - self.error))

    def observe(self, spent: float, asked: float) -> None:
        """Takes note of what a step spent when ``asked`` was its budget."""
        self.error += GAIN * (spent - asked)
