"""Which dial a step trains at: a pure function of seed and step, so that resuming needs no random state."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from dynaconv.config import FinetuneConfig


@dataclass(frozen=True)
class Draw:
    """What a step runs at beside the full dial.

    Attributes:
        budget: Active FFN share.
        routed: Whether routers decide; otherwise all tokens get the same width.
    """

    budget: float
    routed: bool

    def uniform_width(self, blocks: int) -> int:
        """The nearest width for all tokens, at least one block."""
        return max(1, round(self.budget * blocks))


def draw(config: FinetuneConfig, seed: int, step: int, steps: int) -> Draw:
    """The dial of ``step`` out of ``steps``: uniform widths first, so that every width is worth something."""
    low, high = config.budgets
    routed = config.router != "uniform" and step >= config.uniform_share * steps
    return Draw(budget=random.Random(f"dial {seed} {step}").uniform(low, high), routed=routed)


def rate(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, cosine decay to zero."""
    return min(1.0, (step + 1) / max(1, warmup)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
