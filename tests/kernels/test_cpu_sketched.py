"""The CPU backend for sketched FFNs: what the router and the reference give together, in one pass over the codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sketched_networks import ACTIVATIONS, Case

from dynaconv.dynamic.layout import CopyLayout
from dynaconv.kernels.cpu_sketched import CPU_SKETCHED, TOKENS

pytest.importorskip("numba")


def check(case: Case, tokens: int = 3, share: float = 0.4, exact: float = 0.1, rtol: float = 2e-4) -> None:
    x = case.draw(tokens, case.residual)
    thresholds = case.thresholds(x, share, exact)
    found = CPU_SKETCHED.run(case.sketched(), x, case.asked(*thresholds))
    expected = case.expected(x, *thresholds)
    assert found.counts.tolist() == expected.counts.tolist()
    assert found.output.dtype == x.dtype
    torch.testing.assert_close(
        found.output.float(), expected.output, rtol=rtol, atol=rtol * float(expected.output.abs().max())
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_three_tiers(activation: str, gated: bool) -> None:
    check(Case(128, 100, gated=gated, activation=activation, biases=activation != "silu"))


@pytest.mark.parametrize("residual", [16, 48, 64, 80, 128, 576, 1040])
def test_widths_that_fill_no_whole_pieces(residual: int) -> None:
    check(Case(residual, 65))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_half_precision(dtype: torch.dtype, rtol: float) -> None:
    check(Case(96, 70, dtype=dtype), rtol=rtol)


@pytest.mark.parametrize(
    ("planes", "values", "bits"), [(4, True, 2), (4, True, 4), (3, False, 3), (4, False, 3), (2, False, 2)]
)
def test_planes(planes: int, values: bool, bits: int) -> None:
    check(Case(128, 77, layout=CopyLayout(planes, 32, values), bits=bits))


@pytest.mark.parametrize(("share", "exact"), [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.3, 0.3)])
def test_no_neuron_and_all(share: float, exact: float) -> None:
    case = Case(64, 50)
    x = case.draw(2, 64)
    end = {0.0: torch.full((2,), 60.0), 1.0: torch.full((2,), -160.0)}
    thresholds = case.thresholds(x, share, exact)
    thresholds = end.get(share, thresholds[0]), end.get(exact, thresholds[1])
    found, expected = CPU_SKETCHED.run(case.sketched(), x, case.asked(*thresholds)), case.expected(x, *thresholds)
    assert found.counts.tolist() == expected.counts.tolist()
    torch.testing.assert_close(found.output, expected.output, rtol=2e-4, atol=2e-4)


def test_a_token_does_not_depend_on_the_batch_around_it() -> None:
    case = Case(128, 90)
    x = case.draw(TOKENS, 128)
    thresholds = case.thresholds(x, 0.4, 0.1)
    together = CPU_SKETCHED.run(case.sketched(), x, case.asked(*thresholds))
    for token in range(TOKENS):
        one = case.asked(*(part[token : token + 1] for part in thresholds))
        alone = CPU_SKETCHED.run(case.sketched(), x[token : token + 1], one)
        assert torch.equal(alone.output[0], together.output[token])
        assert alone.counts.tolist() == together.counts[token : token + 1].tolist()


def test_threads_share_the_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynaconv.kernels.cpu_sketched.PART", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    check(Case(128, 100))


def test_nan_reaches_the_output_of_its_own_token_alone() -> None:
    case = Case(64, 50)
    x = case.draw(2, 64)
    thresholds = case.thresholds(x, 0.4, 0.1)
    x[0, 3] = torch.nan
    found = CPU_SKETCHED.run(case.sketched(), x, case.asked(*thresholds))
    assert found.output[1].isfinite().all()


@pytest.mark.parametrize(
    ("changes", "tokens", "reason"),
    [
        ({"residual": 77}, 1, "divisible by 16"),
        ({"layout": CopyLayout(4, 16)}, 1, "groups of 32"),
        ({"layout": CopyLayout(5, 32)}, 1, "read 2 bits"),
        ({}, TOKENS + 1, "matrix products"),
        ({"dtype": torch.float64}, 1, "no loops"),
    ],
)
def test_passes_over_what_it_cannot_run(changes: dict[str, Any], tokens: int, reason: str) -> None:
    case = Case(**{"residual": 64, "neurons": 20, **changes})
    able, why = CPU_SKETCHED.can_run(case.sketched(), case.draw(tokens, case.residual))
    assert not able
    assert reason in why
