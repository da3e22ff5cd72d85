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
        full: Whether the step trains the full dial and nothing else.
        higher: A second budget, not below the first, for the consistency loss.
    """

    budget: float
    routed: bool
    full: bool = False
    higher: float = 1.0


def draw(config: FinetuneConfig, seed: int, step: int, steps: int) -> Draw:
    """The dial of ``step`` out of ``steps``.

    Widths are uniform first, so that every width is worth something, then the routers'. Budgets are a mixture first,
    then, where one is set, the anchor (the curriculum of MoE-PHDS, arXiv 2509.23012).
    """
    chance = random.Random(f"dial {seed} {step}")
    low, high = config.budgets
    budget = _sample(chance, config.distribution, low, high)
    if config.anchor is not None and step >= config.anchor_after * steps:
        budget = config.anchor
    begin = 0.0 if config.trainable == "routers" else config.uniform_share * steps
    routed = config.router != "uniform" and step >= begin
    full = chance.random() < config.full_share
    return Draw(budget, routed, full, higher=budget + chance.random() * max(0.0, high - budget))


def uniform_width(budget: float, blocks: int) -> int:
    """The width nearest to ``budget`` for all tokens, at least one block."""
    return max(1, round(budget * blocks))


def rate(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, cosine decay to zero."""
    return min(1.0, (step + 1) / max(1, warmup)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def _sample(chance: random.Random, distribution: str, low: float, high: float) -> float:
    """One budget: ``uniform``, ``low`` (uniform in its logarithm) or ``high`` (the mirror image of ``low``)."""
    if distribution == "uniform":
        return chance.uniform(low, high)
    small = math.exp(chance.uniform(math.log(low), math.log(high)))
    small = min(high, max(low, small))  # rounding
    return small if distribution == "low" else low + high - small
