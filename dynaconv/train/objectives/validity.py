"""Which combinations of losses leave something without anything to learn from."""

from __future__ import annotations

from collections.abc import Iterator

from dynaconv.config import FinetuneConfig
from dynaconv.train.objectives.base import Objective
from dynaconv.train.objectives.registry import objectives, trains, weighted
from dynaconv.train.router_kinds import router_objective


def problems_of_losses(tuning: FinetuneConfig) -> Iterator[str]:
    """A sentence for each mistake in ``finetune.losses``, seen together with what is trained."""
    if tuning.trainable == "routers" and router_objective(tuning) == "none":
        yield f"finetune.trainable is 'routers'; with finetune.router {tuning.router!r} there are none"
        return
    lacking = list(_lacking(tuning))
    if lacking:
        for_all = [name for name in objectives(tuning) if all(name in _training(what, tuning) for what in lacking)]
        if for_all:
            yield _nothing_for(" and the ".join(lacking), for_all, tuning)
        else:
            yield from (_nothing_for(what, _training(what, tuning), tuning) for what in lacking)
    if tuning.full_share and not any(one.student == "full" and trains(one, tuning) for one in _from_the_start(tuning)):
        said = "at the full dial nothing is trained from the first step on (losses, trainable)"
        yield f"finetune.full_share is {tuning.full_share}; {said}"


def _lacking(tuning: FinetuneConfig) -> Iterator[str]:
    """What is to be trained and is not: the weights from the first step on, the routers at some time.

    Routers that are trained alone have to learn from the first step on as well: a step must have a gradient.
    """
    alone = tuning.trainable == "routers"
    first, ever = _from_the_start(tuning), weighted(tuning).values()
    if not alone and not any("weights" in trains(one, tuning) for one in first):
        yield "weights"
    if router_objective(tuning) == "none":
        return
    if not any("routers" in trains(one, tuning) for one in (first if alone else ever)):
        yield "routers"


def _from_the_start(tuning: FinetuneConfig) -> list[Objective]:
    return [one for name, one in weighted(tuning).items() if getattr(tuning.losses, name).after == 0]


def _training(what: str, tuning: FinetuneConfig) -> list[str]:
    """Names of the objectives that would train the ``weights`` or the ``routers``."""
    return [name for name, objective in objectives(tuning).items() if what in trains(objective, tuning)]


def _nothing_for(learner: str, candidates: list[str], tuning: FinetuneConfig) -> str:
    if len(candidates) == 1 and getattr(tuning.losses, candidates[0]).weight == 0:
        name = f"finetune.losses.{candidates[0]}.weight"
        return f"{name} is 0.0; it must be above 0 for finetune.router {tuning.router!r} to learn"
    one_of = " or ".join(filter(None, [", ".join(candidates[:-1]), candidates[-1]]))
    remedy = f"give {one_of} a weight above 0 from the first step on"
    return f"finetune.losses leave the {learner} nothing to learn from: {remedy}"
