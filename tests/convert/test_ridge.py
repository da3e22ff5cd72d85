"""The closed form against an independent solution of the same least squares, by rows instead of sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynaconv.convert.ridge import solve_ridge
from dynaconv.errors import ArtifactError


def sums(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    extended = torch.cat([features, torch.ones(len(features), 1, dtype=features.dtype)], dim=1)
    return extended.T @ extended, extended.T @ targets


@settings(deadline=None, max_examples=30)
@given(
    tokens=st.integers(1, 60), width=st.integers(1, 12), outputs=st.integers(1, 5),
    ridge=st.sampled_from([1e-3, 0.1, 10.0]), seed=st.integers(0, 999),
)  # fmt: skip
def test_it_is_the_minimum(tokens: int, width: int, outputs: int, ridge: float, seed: int) -> None:
    """Ridge by rows: centred features with sqrt(lambda) I beneath them, solved by QR."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(tokens, width, generator=generator, dtype=torch.float64) + 3
    targets = torch.randn(tokens, outputs, generator=generator, dtype=torch.float64) - 7
    weight, bias = solve_ridge(*sums(features, targets), ridge)
    centred = features - features.mean(0)
    strength = ridge * centred.square().mean() * tokens
    if tokens > 1:
        rows = torch.cat([centred, strength.sqrt() * torch.eye(width, dtype=torch.float64)])
        sides = torch.cat([targets - targets.mean(0), torch.zeros(width, outputs, dtype=torch.float64)])
        torch.testing.assert_close(weight, torch.linalg.lstsq(rows, sides).solution.T, rtol=1e-6, atol=1e-8)
    assert weight.shape == (outputs, width) and bias.shape == (outputs,)
    assert weight.dtype == bias.dtype == torch.float64
    mean_prediction = (features @ weight.T + bias).mean(0)
    torch.testing.assert_close(mean_prediction, targets.mean(0))  # a free bias makes the mean exact at any strength


def test_a_linear_rule_is_found_from_single_precision_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    features = 5 + torch.randn(5000, 16, generator=generator)
    rule, shift = torch.randn(16, 3, generator=generator), torch.tensor([1.0, -200.0, 30.0])
    weight, bias = solve_ridge(*sums(features, features @ rule + shift), 1e-6)
    torch.testing.assert_close(weight.float(), rule.T, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(bias.float(), shift, rtol=1e-2, atol=0.2)


def test_strength_shrinks_weights_but_not_the_bias() -> None:
    features, targets = torch.randn(200, 4), torch.full((200, 1), 1000.0) + torch.randn(200, 1)
    weak, _ = solve_ridge(*sums(features, targets), 1e-3)
    strong, bias = solve_ridge(*sums(features, targets), 1e6)
    assert strong.norm() < 1e-4 * weak.norm()
    assert bias.item() == pytest.approx(targets.mean().item(), rel=1e-5)


def test_features_that_never_change_leave_the_mean() -> None:
    features, targets = torch.full((10, 3), 2.0), torch.arange(10.0)[:, None]
    weight, bias = solve_ridge(*sums(features, targets), 1e-3)
    assert torch.equal(weight, torch.zeros(1, 3, dtype=torch.float64)) and bias.item() == 4.5


def test_more_features_than_tokens_is_solved() -> None:
    features, targets = torch.randn(3, 50), torch.randn(3, 2)
    weight, bias = solve_ridge(*sums(features, targets), 1e-3)
    torch.testing.assert_close((features.double() @ weight.T + bias).float(), targets, rtol=0.05, atol=0.05)


def test_arguments_are_not_changed() -> None:
    gram, target = sums(torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64))
    before = gram.clone(), target.clone()
    solve_ridge(gram, target, 1.0)
    assert torch.equal(gram, before[0]) and torch.equal(target, before[1])


def test_sums_of_no_text_or_with_nan_are_refused() -> None:
    gram, target = sums(torch.randn(20, 4), torch.randn(20, 2))
    with pytest.raises(ArtifactError, match="empty"):
        solve_ridge(torch.zeros_like(gram), torch.zeros_like(target), 1.0)
    with pytest.raises(ArtifactError, match="not finite"):
        solve_ridge(gram, target * torch.nan, 1.0)
    gram[0, 1] = gram[1, 0] = 10 * gram[0, 0]
    with pytest.raises(ArtifactError, match=r"not positive definite[\s\S]*carve\.ridge"):
        solve_ridge(gram, target, 1e-3)
