"""The objectives of a recipe, and what they need of each step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from importlib import import_module

from dynaconv.config import FinetuneConfig, LossConfig
from dynaconv.train.objectives.base import Objective, Pass
from dynaconv.train.router_kinds import router_objective


def objectives(tuning: FinetuneConfig) -> dict[str, Objective]:
    """Every objective there is, by its name in ``finetune.losses``, whatever it weighs."""
    return {entry.name: _load(entry.metadata["objective"])(tuning) for entry in fields(tuning.losses)}


def weighted(tuning: FinetuneConfig) -> dict[str, Objective]:
    """The objectives that the recipe gives a weight and something to do."""
    found = objectives(tuning)
    return {name: one for name, one in found.items() if one.needs and getattr(tuning.losses, name).weight > 0}


def passes_of(active: Iterable[Objective], *, by_router: bool) -> frozenset[Pass]:
    """The passes that a step with these objectives runs.

    Args:
        active: What it minimises.
        by_router: Whether routers decide at the sampled dial. Their threshold is solved on scores of the full dial,
            which then runs whether an objective asks for it or not.
    """
    needed: set[Pass] = set()
    for objective in active:
        needed |= objective.needs
    if by_router and "dial" in needed:
        needed.add("full")
    return frozenset(needed)


def needs_parent(tuning: FinetuneConfig) -> bool:
    """Whether the frozen dense checkpoint teaches."""
    return any("parent" in objective.needs for objective in weighted(tuning).values())


def trains(objective: Objective, tuning: FinetuneConfig) -> set[str]:
    """What ``objective`` gives gradients to under this recipe: ``weights``, ``routers`` or both."""
    trained = set()
    if "labels" in objective.needs:
        trained = {"routers"}
    elif objective.needs:
        trained = {"weights"} if tuning.trainable != "routers" else set()
        if objective.student == "dial" and router_objective(tuning) == "dial":
            trained |= {"routers"}
    return trained


def weight_at(loss: LossConfig, step: int, steps: int) -> float:
    """Weight of ``loss`` at ``step`` of ``steps``: nothing up to ``after``, a straight rise over ``ramp``, then all."""
    if step < loss.after * steps:
        return 0.0
    if not loss.ramp:
        return loss.weight
    return loss.weight * min(1.0, (step + 1 - loss.after * steps) / (loss.ramp * steps))


def _load(place: str) -> type[Objective]:
    """The class at ``place``, a ``module:Class``."""
    module, _, name = place.partition(":")
    found: type[Objective] = getattr(import_module(module), name)
    return found
