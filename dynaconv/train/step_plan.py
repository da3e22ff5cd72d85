"""What a step runs, as it follows from its objectives: a pure function of recipe, seed and step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dynaconv.config import FinetuneConfig
from dynaconv.train.objectives.base import Objective, Outcome, Pass
from dynaconv.train.objectives.registry import objectives, passes_of, weight_at
from dynaconv.train.sampler import Draw, draw


@dataclass(frozen=True)
class StepPlan:
    """The dial of a step, what it minimises, and the passes that this needs.

    Attributes:
        drawn: Its dial.
        objectives: All that there are, by name.
        weights: Weight of those that are minimised in this step.
        passes: What these need.
        measured: Whether statistics of the routers are taken.
    """

    drawn: Draw
    objectives: Mapping[str, Objective] = field(compare=False)
    weights: Mapping[str, float]
    passes: frozenset[Pass]
    measured: bool = False

    @classmethod
    def of(cls, config: FinetuneConfig, seed: int, step: int, steps: int) -> StepPlan:
        """The plan of ``step`` (from 0) of ``steps``."""
        drawn, known = draw(config, seed, step, steps), objectives(config)
        weights = {name: weight_at(getattr(config.losses, name), step, steps) for name in known}
        active = {name: weight for name, weight in weights.items() if weight > 0 and _can_run(known[name], drawn)}
        passes = passes_of((known[name] for name in active), by_router=drawn.by_router)
        every = config.statistics_every
        measured = drawn.by_router and "dial" in passes and every > 0 and step % every == 0
        return cls(drawn, known, active, passes, measured)

    @property
    def by_router(self) -> bool:
        """Whether routers decide at the sampled dial."""
        return self.drawn.by_router and "dial" in self.passes

    def trains(self, student: Pass) -> bool:
        """Whether an objective has its gradient from the pass ``student``."""
        return any(self.objectives[name].student == student for name in self.weights)

    def losses(self, student: Pass, outcome: Outcome) -> dict[str, Tensor]:
        """By name, the losses that go through ``student``: those that weigh something, and those that are reported."""
        return {
            name: objective.loss(outcome)
            for name, objective in self.objectives.items()
            if objective.needs and objective.student == student
            if name in self.weights or (objective.reported and objective.needs <= self.passes)
        }


def _can_run(objective: Objective, drawn: Draw) -> bool:
    """Whether a step with this dial can run what ``objective`` needs: labels are made where routers decide."""
    if not objective.needs or (drawn.full and objective.student == "dial"):
        return False
    return drawn.by_router or "labels" not in objective.needs
