"""Counts of scores say what sorting them would, to the width of a bin."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynaconv.dynamic.cost import UnitCost
from dynaconv.dynamic.score_histogram import HIGHEST, LOWEST, WIDTH, NeuronScores, ScoreHistogram


def drawn(seed: int, count: int = 2000) -> torch.Tensor:
    """Scores (count,), some of them beyond both ends."""
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(count, generator=generator) + 60 * (torch.rand(count, generator=generator) > 0.98).float()


def counted(scores: torch.Tensor) -> ScoreHistogram:
    made = ScoreHistogram()
    made.add(scores)
    return made


@given(seed=st.integers(0, 100), threshold=st.floats(-40, 40))
def test_the_share_above_is_that_of_sorting(seed: int, threshold: float) -> None:
    scores = drawn(seed)
    found = counted(scores).above(threshold)
    inside = min(max(threshold, LOWEST), HIGHEST)
    most, least = (float((scores.clamp(LOWEST, HIGHEST) > inside + way * WIDTH).float().mean()) for way in (-1, 1))
    assert least - 1e-6 <= found <= most + 1e-6


@given(seed=st.integers(0, 100), share=st.floats(0.01, 0.95))
def test_the_quantile_is_that_of_sorting(seed: int, share: float) -> None:
    scores = drawn(seed)
    threshold = counted(scores).quantile(share)
    exact = float(scores.clamp(LOWEST, HIGHEST).sort(descending=True).values[math.ceil(share * len(scores)) - 1])
    assert threshold == pytest.approx(exact, abs=2 * WIDTH)
    assert counted(scores).above(threshold) == pytest.approx(share, abs=2e-3)


def test_more_is_above_a_lower_threshold() -> None:
    made = counted(drawn(0))
    shares = [made.above(threshold) for threshold in torch.linspace(-40, 40, 1001).tolist()]
    assert shares == sorted(shares, reverse=True) and shares[0] == 1.0 and shares[-1] == 0.0
    assert made.above(-math.inf) == 1.0 and made.above(math.inf) == 0.0
    assert ScoreHistogram().above(0.0) == 0.0


@given(st.lists(st.integers(0, 100), min_size=1, max_size=4))
def test_counts_add_up_over_parts_of_any_shape(seeds: list[int]) -> None:
    parts = [drawn(seed, 120) for seed in seeds]
    apart = ScoreHistogram()
    for part in parts:
        apart.add(part.view(4, 5, 6))
    whole = counted(torch.cat(parts))
    assert torch.equal(apart.counts, whole.counts) and int(whole.counts.sum()) == 120 * len(seeds)
    merged = ScoreHistogram(sum((counted(part).counts for part in parts), torch.zeros_like(whole.counts)))
    assert merged.above(0.3) == whole.above(0.3)


@pytest.mark.parametrize("shape", [(1,), (3, 1000)])
def test_nan_is_refused(shape: tuple[int, ...]) -> None:
    scores = torch.zeros(shape)
    scores.view(-1)[-1] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        ScoreHistogram().add(scores)


@given(seed=st.integers(0, 50), budget=st.floats(0.15, 0.9), margin=st.sampled_from([0.0, 0.5, 2.0]))
def test_the_threshold_spends_the_budget(seed: int, budget: float, margin: float) -> None:
    """As the definition counts it: active, exact, and looked at twice, on the scores themselves."""
    compared, looked = drawn(seed), drawn(seed) + drawn(seed + 1).abs()
    scores, cost = NeuronScores(), UnitCost(0.1, 1.0, 0.3, 0.1)
    scores.add(compared, looked)
    threshold = scores.threshold(budget, cost, margin)
    active, exact, closer = (
        float((one > at).float().mean())
        for one, at in ((compared, threshold), (compared, threshold + margin), (looked, threshold))
    )
    assert cost.of(active, exact, closer) == pytest.approx(budget, abs=0.01)
    assert scores.spent(threshold, cost, margin) == pytest.approx(budget, abs=1e-3)
    assert scores.threshold(min(1.0, budget + 0.05), cost, margin) < threshold
