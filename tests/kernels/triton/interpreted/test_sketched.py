"""The GPU backend of sketch routers, run by Triton's interpreter, against router and reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sketched_networks import ACTIVATIONS, Case

from dynaconv.dynamic.layout import CopyLayout
from dynaconv.kernels.sketched import Asked
from dynaconv.kernels.triton_sketched import can_run, run

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EXACT = CopyLayout(values=False)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def agree(case: Case, x: torch.Tensor, thresholds: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Same counts, which are given back, and outputs equal but for rounding of the result's dtype."""
    able, reason = can_run(case.sketched(), x)
    assert able, reason
    found, expected = run(case.sketched(), x, case.asked(*thresholds)), case.expected(x, *thresholds)
    assert found.output.dtype == x.dtype
    assert found.counts.tolist() == expected.counts.tolist()
    error = (found.output.float() - expected.output).norm() / expected.output.norm().clamp_min(1e-6)
    assert error <= TOLERANCE[x.dtype]
    return found.counts


def check(case: Case, tokens: int = 1, share: float = 0.75, exact: float = 0.5) -> torch.Tensor:
    x = case.draw(tokens, case.residual)
    return agree(case, x, case.thresholds(x, share, exact, near=2))


@pytest.mark.parametrize(
    ("activation", "gated"), [*zip(ACTIVATIONS, (True, False, True, False), strict=True), ("relu", True)]
)
def test_three_tiers(activation: str, gated: bool) -> None:
    counts = check(Case(47, 20, gated=gated, activation=activation, biases=activation != "silu"), tokens=2)
    assert (counts[:, 1] > counts[:, 2]).all() and (counts[:, 2] > 0).all(), "some neurons are exact, and some not"


@pytest.mark.parametrize("means", [True, False])
def test_all_that_are_on_are_exact(means: bool) -> None:
    check(Case(63, 21, layout=EXACT, means=means))


@pytest.mark.parametrize(("threshold", "on"), [(60.0, 0), (-160.0, 9)])
def test_one_level_for_all_tokens_that_no_neuron_passes_or_all_do(threshold: float, on: int) -> None:
    case = Case(63, 9)
    level = torch.tensor(threshold)
    assert (agree(case, case.draw(2, 63), (level, torch.tensor(60.0)))[:, 1] == on).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_means_of_each_token(dtype: torch.dtype) -> None:
    case = Case(47, 18, dtype=dtype)
    case.mean = case.draw(2, 18).float() / 4
    check(case, tokens=2)


@pytest.mark.parametrize(("coarse", "bits", "planes"), [(1, 1, 1), (1, 4, 4), (3, 3, 8), (2, 5, 6)])
def test_numbers_of_planes(coarse: int, bits: int, planes: int) -> None:
    check(Case(40, 5, layout=CopyLayout(planes), coarse=coarse, bits=bits))


def test_columns_of_several_steps() -> None:
    """Longer than a program reads at once, of codes (4096 columns) and of weights (256)."""
    check(Case(4160, 5, layout=CopyLayout(group=64)))


def test_tokens_have_levels_of_their_own_and_do_not_see_their_batch() -> None:
    """Every row has the same bits alone, and in batches of other sizes."""
    case = Case(63, 9)
    x = case.draw(5, 63)
    rows = [case.thresholds(x[m : m + 1], share, 0.7 * share, near=2) for m, share in enumerate(SHARES)]
    thresholds = torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])
    agree(case, x, thresholds)
    together = run(case.sketched(), x, case.asked(*thresholds))
    for part in (slice(1, 2), slice(2, 5)):
        own = run(case.sketched(), x[part], case.asked(*(one[part] for one in thresholds)))
        assert torch.equal(own.output, together.output[part])
        assert torch.equal(own.counts, together.counts[part])


def test_an_infinite_weight_of_a_neuron_that_is_off_does_no_harm() -> None:
    case = Case(40, 12, layout=EXACT, means=False)
    ffn, x = case.sketched(), case.draw(2, 40)
    threshold, _ = case.thresholds(x, 0.5, 0.5, near=2)
    level = case.router.level(threshold)
    alone = run(ffn, x[:1], Asked(level[:1])).output
    on = case.router.parts(case.router(x))[0] > threshold[:, None]
    off = ~on[0] & on[1]
    assert off.any()
    ffn.weights.down[:, off] = torch.inf
    together = run(ffn, x, Asked(level)).output
    assert torch.equal(together[:1], alone)
    assert not together[1].isfinite().all()


def test_no_token() -> None:
    case = Case(40, 12)
    found = run(case.sketched(), torch.empty(0, 40), Asked(torch.empty(0)))
    assert found.output.shape == (0, 40) and found.counts.shape == (0, 3)


@pytest.mark.parametrize(
    ("changes", "tokens", "reason"),
    [
        ({}, 17, "16 tokens"),
        ({"layout": CopyLayout(group=8)}, 2, "multiples of 32"),
        ({"dtype": torch.float64}, 2, "float64"),
    ],
)
def test_passes_over_what_it_cannot_run(changes: dict[str, Any], tokens: int, reason: str) -> None:
    case = Case(**{"residual": 40, "neurons": 12, **changes})
    able, why = can_run(case.sketched(), case.draw(tokens, 40))
    assert not able
    assert reason in why


def test_passes_over_gradients_other_activations_and_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(40, 12)
    ffn, x = case.sketched(), case.draw(2, 40)
    assert "activation" in can_run(replace(ffn, activation="snake"), x)[1]
    assert "gradients" in can_run(ffn, x.clone().requires_grad_())[1]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert can_run(ffn, x) == (False, "tensors are not on a GPU")
