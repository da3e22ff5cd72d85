"""Exact, low-bit and mean neurons in one product: each token's output is the sum of what its neurons give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ffn_networks import random_network
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from dynaconv.dynamic.few_bits import FewBitCopy
from dynaconv.dynamic.layout import CopyLayout
from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Soft, Subset
from dynaconv.kernels.dispatch import blocked_ffn as dispatched
from dynaconv.kernels.dispatch import decide
from dynaconv.kernels.partition import Partition
from dynaconv.kernels.reference import blocked_ffn, hidden_neurons, select
from dynaconv.kernels.weights import FFNWeights

D, F, M = 11, 26, 9
SINGLE = Partition.equal(F, 1)


def low_of(weights: FFNWeights, bits: int = 4) -> FFNWeights:
    copy = FewBitCopy(CopyLayout(bits, 8), min(bits, 3), min(bits, 2))
    copy.follow(weights)
    with torch.no_grad():
        return copy.low(weights)


def drawn(seed: int, active: float = 0.6, exact: float = 0.5) -> tuple[Tensor, Subset]:
    """Tokens, and what they use."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(M, D, generator=generator, dtype=torch.float64)
    on = torch.rand(M, F, generator=generator) < active
    return x, Subset(on, on & (torch.rand(M, F, generator=generator) < exact))


def by_neuron(x: Tensor, choice: Subset, weights: FFNWeights, low: FFNWeights, mean: Tensor | None) -> Tensor:
    """The definition, neuron by neuron."""
    given, few = hidden_neurons(x, weights), hidden_neurons(x, low)
    found = torch.zeros_like(x) if weights.down_bias is None else weights.down_bias.expand_as(x).clone()
    assert choice.exact is not None
    for token in range(len(x)):
        for neuron in range(F):
            if choice.exact[token, neuron]:
                found[token] += given[token, neuron] * weights.down[:, neuron]
                continue
            value = torch.zeros(()) if mean is None else mean[neuron] if mean.dim() == 1 else mean[token, neuron]
            found[token] += value * weights.down[:, neuron]
            if choice.on[token, neuron]:
                found[token] += (few[token, neuron] - value) * low.down[:, neuron]
    return found


@given(
    seed=st.integers(0, 200),
    gated=st.booleans(),
    bias=st.booleans(),
    active=st.sampled_from([0.0, 0.3, 0.8, 1.1]),
    exact=st.sampled_from([0.0, 0.5, 1.1]),
    means=st.sampled_from(["none", "one set", "each token's"]),
)
def test_three_tiers_add_up(seed: int, gated: bool, bias: bool, active: float, exact: float, means: str) -> None:
    weights = random_network(D, F, gated=gated, bias=bias, seed=seed)
    low, (x, choice) = low_of(weights), drawn(seed, active, exact)
    shape = {"none": None, "one set": (F,), "each token's": (M, F)}[means]
    mean = None if shape is None else torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
    ffn, expected = BlockedFFN(weights, SINGLE, low, mean), by_neuron(x, choice, weights, low, mean)
    torch.testing.assert_close(blocked_ffn(ffn, x, choice), expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(dispatched(ffn, x, choice), expected, rtol=1e-9, atol=1e-9)


def test_one_tier_alone() -> None:
    weights, (x, choice) = random_network(D, F, bias=True), drawn(0)
    low, every = low_of(weights), torch.ones(M, F, dtype=torch.bool)
    mean = torch.randn(F, dtype=torch.float64)
    ffn = BlockedFFN(weights, SINGLE, low, mean)
    exact = blocked_ffn(ffn, x, Subset(choice.on, choice.on))
    assert torch.equal(exact, blocked_ffn(ffn, x, Subset(choice.on))), "all exact is no third tier"
    few = linear(hidden_neurons(x, low), low.down, weights.down_bias)
    torch.testing.assert_close(blocked_ffn(replace(ffn, mean=None), x, Subset(every, ~every)), few)
    off = linear(mean.expand(M, F), weights.down, weights.down_bias)
    torch.testing.assert_close(blocked_ffn(ffn, x, Subset(~every, ~every)), off)
    full = linear(hidden_neurons(x, weights), weights.down, weights.down_bias)
    torch.testing.assert_close(blocked_ffn(ffn, x, Subset(every, every)), full)


def test_no_kernel_without_the_tiers_takes_them() -> None:
    weights, (x, choice) = random_network(D, F), drawn(0)
    with torch.no_grad():
        assert decide(BlockedFFN(weights, SINGLE), x, Subset(choice.on)).backend.name != "reference"
        for ffn in (BlockedFFN(weights, SINGLE, low_of(weights)), BlockedFFN(weights, SINGLE, None, torch.zeros(F))):
            assert decide(ffn, x, choice).backend.name == "reference"


@pytest.mark.parametrize("means", [False, True])
def test_gradients_are_straight_through_and_reach_means(means: bool) -> None:
    """Of low-bit neurons: those of the product of low-bit values, for the weights they were made of."""
    base = random_network(D, F, bias=True)
    leaves = {name: getattr(base, name).clone().requires_grad_() for name in ("gate", "up", "down")}
    weights, (x, choice) = base._replace(**leaves), drawn(1)
    copy = FewBitCopy(CopyLayout(4, 8), 3, 2)
    copy.follow(weights)
    mean = torch.randn(F, dtype=torch.float64, requires_grad=True) if means else None
    values = copy.low(weights)
    with torch.no_grad():
        rounded = copy.low(weights)
    torch.testing.assert_close(values.up, rounded.up)
    assert values.up.requires_grad
    out = blocked_ffn(BlockedFFN(weights, SINGLE, values, mean), x, choice)
    target = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (out * target).sum().backward()
    assert choice.exact is not None
    low_leaves = {name: getattr(rounded, name).clone().requires_grad_() for name in ("gate", "up", "down")}
    exact_leaves = {name: getattr(base, name).clone().requires_grad_() for name in ("gate", "up", "down")}
    exact, low = base._replace(**exact_leaves), base._replace(**low_leaves)
    given = hidden_neurons(x, exact) * choice.exact
    some, average = choice.on & ~choice.exact, torch.zeros(F) if mean is None else mean.detach()
    few = (hidden_neurons(x, low) - average) * some
    ((linear(given + average * ~choice.exact, exact.down) + linear(few, low.down)) * target).sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, exact_leaves[name].grad + low_leaves[name].grad)
    if mean is not None:
        given_up = (target @ base.down) * ~choice.exact - (target @ rounded.down) * some
        torch.testing.assert_close(mean.grad, given_up.sum(0))


def test_soft_choices_lie_between_mean_and_neuron() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, mean = (torch.randn(M, F, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.rand(M, F, generator=generator, dtype=torch.float64)
    found = select(hidden, Soft(weight), SINGLE, mean)
    torch.testing.assert_close(found, weight * hidden + (1 - weight) * mean)
    hard = (weight > 0.5).double()
    torch.testing.assert_close(select(hidden, Soft(hard), SINGLE, mean), select(hidden, Subset(hard > 0), SINGLE, mean))


def test_what_is_off_never_reaches_the_result() -> None:
    weights, (x, choice) = random_network(D, F), drawn(2)
    broken = weights._replace(up=weights.up.clone())
    broken.up[3] = torch.inf
    on = choice.on.clone()
    on[:, 3] = False
    ffn = BlockedFFN(broken, SINGLE, low_of(weights), torch.ones(F, dtype=torch.float64))
    assert bool(blocked_ffn(ffn, x, replace(choice, on=on, exact=choice.exact & on)).isfinite().all())  # type: ignore[operator]
