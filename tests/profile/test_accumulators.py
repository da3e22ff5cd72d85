"""Merging the sums of two parts gives the sums of one pass."""

import pytest
import torch

from dynaconv.profile.accumulators import QUANTILES, ActivationMean, CurveStatistics, RidgeStatistics

TOKENS, WIDTH, NEURONS, BLOCKS = 2000, 6, 20, 4


def random_errors(tokens: int = TOKENS) -> torch.Tensor:
    errors = torch.rand(tokens, BLOCKS + 1) ** 2 * torch.linspace(1.2, 0.0, BLOCKS + 1)
    errors[:, 0], errors[:, -1] = 1.0, 0.0
    return errors


def gathered(kind: str, part: slice):
    torch.manual_seed(0)
    errors, x, hidden = random_errors(), torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, NEURONS)
    if kind == "activation":
        sums = ActivationMean(NEURONS)
        sums.add(hidden[part])
    elif kind == "curves":
        sums = CurveStatistics(BLOCKS + 1)
        sums.add(errors[part])
    else:
        sums = RidgeStatistics(WIDTH, BLOCKS)
        sums.add(x[part], errors[part, :-1])
    return sums


@pytest.mark.parametrize("kind", ["activation", "curves", "ridge"])
@pytest.mark.parametrize("cut", [0, 1, 777, TOKENS])
def test_two_parts_merged_equal_one_pass(kind: str, cut: int) -> None:
    whole = gathered(kind, slice(None))
    saved = {name: tensor.clone() for name, tensor in gathered(kind, slice(cut, None)).tensors().items()}
    loaded = type(whole).from_tensors(saved)
    merged = gathered(kind, slice(None, cut)).merge(loaded)
    assert merged.tokens == whole.tokens == TOKENS
    assert merged.tensors().keys() == whole.tensors().keys()
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(merged.tensors()[name], tensor, rtol=1e-5, atol=1e-3)
    assert all(torch.equal(tensor, loaded.tensors()[name]) for name, tensor in saved.items())  # left alone


def test_sums_of_other_sizes_or_kinds_do_not_merge() -> None:
    with pytest.raises(ValueError, match="cannot merge"):
        ActivationMean(4).merge(ActivationMean(1))
    with pytest.raises(ValueError, match="cannot merge RidgeStatistics"):
        ActivationMean(4).merge(RidgeStatistics(2, 2))  # type: ignore[arg-type]


def test_activation_is_the_mean_of_absolute_values() -> None:
    hidden = torch.randn(700, NEURONS)
    mean = ActivationMean(NEURONS)
    mean.add(hidden[:300])
    mean.add(hidden[300:])
    torch.testing.assert_close(mean.mean(), hidden.abs().mean(0))
    assert ActivationMean(3).mean().tolist() == [0, 0, 0]


def test_curve_mean_and_quantiles() -> None:
    errors = random_errors()
    curves = CurveStatistics(BLOCKS + 1)
    for part in errors.split(300):
        curves.add(part)
    torch.testing.assert_close(curves.mean(), errors.mean(0))
    expected = torch.quantile(errors, torch.tensor(QUANTILES), dim=0)
    inner = curves.quantiles()[:, 1:-1]
    torch.testing.assert_close(inner, expected[:, 1:-1], rtol=0.02, atol=2e-4)
    assert curves.quantiles()[:, 0].tolist() == [1.0, 1.0, 1.0]
    assert curves.quantiles()[:, -1].tolist() == [0.0, 0.0, 0.0]


def test_one_block_has_only_the_ends() -> None:
    curves = CurveStatistics(2)
    curves.add(torch.tensor([[1.0, 0.0]] * 3))
    assert curves.mean().tolist() == [1.0, 0.0]
    assert curves.quantiles().tolist() == [[1.0, 0.0]] * 3


def test_ridge_sums_are_the_moments_of_inputs_with_a_one() -> None:
    x, targets = torch.randn(50, WIDTH), torch.randn(50, BLOCKS)
    ridge = RidgeStatistics(WIDTH, BLOCKS)
    ridge.add(x[:20], targets[:20])
    ridge.add(x[20:], targets[20:])
    features = torch.cat([x, torch.ones(50, 1)], dim=1)
    torch.testing.assert_close(ridge.sums["gram"], features.T @ features)
    torch.testing.assert_close(ridge.sums["target"], features.T @ targets)
