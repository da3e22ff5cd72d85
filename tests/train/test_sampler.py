"""The dial of a step: in range, in the proportions asked for, and the same whenever it is asked."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

import pytest

from dynaconv.config import FinetuneConfig
from dynaconv.kernels.partition import Partition
from dynaconv.train.sampler import draw, uniform_width
from dynaconv.train.step_plan import StepPlan

CONFIG = FinetuneConfig(budgets=[0.1, 0.8])
STEPS = 2000


@pytest.mark.parametrize("distribution", ["uniform", "low", "high"])
def test_budgets_stay_between_the_two(distribution: str) -> None:
    draws = [draw(replace(CONFIG, distribution=distribution), 0, step, STEPS) for step in range(STEPS)]
    assert all(0.1 <= one.budget <= one.higher <= 0.8 for one in draws)
    assert min(one.budget for one in draws) < 0.12 and max(one.budget for one in draws) > 0.78


def test_low_and_high_are_mirror_images() -> None:
    low, high = (
        [draw(replace(CONFIG, distribution=name), 0, step, STEPS).budget for step in range(STEPS)]
        for name in ("low", "high")
    )
    assert low == pytest.approx([0.9 - budget for budget in high])
    # a budget whose logarithm is uniform has the mean (b - a) / log(b / a)
    assert mean(low) == pytest.approx(0.7 / 2.0794, abs=0.02)


def test_full_steps_have_their_share_and_leave_the_budgets_as_they_were() -> None:
    some = [draw(replace(CONFIG, full_share=0.3), 0, step, STEPS) for step in range(STEPS)]
    none = [draw(CONFIG, 0, step, STEPS) for step in range(STEPS)]
    assert mean(one.full for one in some) == pytest.approx(0.3, abs=0.04)
    assert not any(one.full for one in none)
    assert [one.budget for one in some] == [one.budget for one in none]


def test_a_mixture_first_then_the_anchor() -> None:
    draws = [draw(replace(CONFIG, anchor=0.25, anchor_after=0.9), 0, step, 100) for step in range(100)]
    assert all(one.budget == 0.25 for one in draws[90:])
    assert len({one.budget for one in draws[:90]}) == 90
    assert all(one.higher >= 0.25 for one in draws[90:])


def test_routers_that_train_alone_decide_from_the_start() -> None:
    later = replace(CONFIG, uniform_share=0.3)
    assert not draw(later, 0, 29, 100).by_router and draw(later, 0, 30, 100).by_router
    assert draw(replace(later, trainable="routers"), 0, 0, 100).by_router


def test_a_plan_is_a_function_of_seed_and_step() -> None:
    config = replace(CONFIG, distribution="low", full_share=0.2, statistics_every=7)
    plans = [StepPlan.of(config, 5, step, 50) for step in range(50)]
    assert plans == [StepPlan.of(config, 5, step, 50) for step in range(50)]
    assert plans != [StepPlan.of(config, 6, step, 50) for step in range(50)]
    assert any(plan.measured for plan in plans)
    assert all(plan.by_router and step % 7 == 0 for step, plan in enumerate(plans) if plan.measured)


def test_widths_are_the_nearest_and_never_none() -> None:
    equal = Partition.equal(64, 8)
    assert [uniform_width(budget, equal) for budget in (0.01, 0.2, 0.5, 1.0)] == [1, 2, 4, 8]
    unequal = Partition.at((0, 10, 20, 100))
    assert [uniform_width(budget, unequal) for budget in (0.01, 0.2, 0.5, 0.7)] == [1, 2, 2, 3], "neurons, not blocks"
