"""How many steps a run has and which dial each trains at: pure functions, so that resuming needs no random state."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from dynaconv.config import FinetuneConfig, RunConfig
from dynaconv.kernels.partition import Partition
from dynaconv.train.router_kinds import NO_ROUTER


@dataclass(frozen=True)
class Draw:
    """What a step runs at beside the full dial.

    Attributes:
        budget: Active FFN share.
        by_router: Whether routers decide; otherwise all tokens get the same width.
        full: Whether the step trains the full dial and nothing else.
        higher: A second budget, not below the first, for the consistency loss.
    """

    budget: float
    by_router: bool
    full: bool = False
    higher: float = 1.0


def steps_of(config: RunConfig) -> int:
    """Optimizer steps of a run, at least one."""
    return max(1, config.finetune.tokens // (config.finetune.batch_size * config.data.sequence_length))


def draw(config: FinetuneConfig, seed: int, step: int, steps: int) -> Draw:
    """The dial of ``step`` out of ``steps``.

    Widths are uniform first, so that every width is worth something, then the routers'. Budgets are a mixture first,
    then, where one is set, the anchor (the curriculum of MoE-PHDS, arXiv 2509.23012).
    """
    chance = random.Random(f"dial {seed} {step}")
    assert config.budgets is not None, "budgets that a recipe leaves open follow from the model"
    low, high = config.budgets
    budget = _sample(chance, config.distribution, low, high)
    if config.anchor is not None and step >= config.anchor_after * steps:
        budget = config.anchor
    begin = 0.0 if config.trainable == "routers" else config.uniform_share * steps
    by_router = config.router != NO_ROUTER and step >= begin
    full = chance.random() < config.full_share
    return Draw(budget, by_router, full, higher=budget + chance.random() * max(0.0, high - budget))


def uniform_width(budget: float, partition: Partition) -> int:
    """The number of first blocks whose share of the neurons is nearest to ``budget``, at least one."""
    return max(1, int((partition.prefix_shares() - budget).abs().argmin()))


def _sample(chance: random.Random, distribution: str, low: float, high: float) -> float:
    """One budget: ``uniform``, ``low`` (uniform in its logarithm) or ``high`` (the mirror image of ``low``)."""
    if distribution == "uniform":
        return chance.uniform(low, high)
    small = math.exp(chance.uniform(math.log(low), math.log(high)))
    small = min(high, max(low, small))  # rounding
    return small if distribution == "low" else low + high - small
