"""The reference against its definition, and its gradients: those that training runs."""

from __future__ import annotations

import pytest
import torch
from ffn_networks import looped_ffn, partitions, random_choice, random_network, random_partition
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Choice, Prefix, Soft, Subset
from dynaconv.kernels.partition import Partition
from dynaconv.kernels.reference import blocked_ffn, hidden_neurons, select
from dynaconv.kernels.weights import FFNWeights

EXACT = {"rtol": 0.0, "atol": 1e-12}
CUTS = {
    "uneven": Partition.at((0, 2, 3, 9)),
    "equal": Partition.equal(9, 3),
    "the last smaller": Partition.equal(9, 4),
    "neurons": Partition.equal(9, 1),
    "one block": Partition.equal(9, 9),
}


def parts_of(weights: FFNWeights) -> list[torch.Tensor]:
    return [part.requires_grad_() for part in weights if isinstance(part, torch.Tensor)]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [0, 1, 2])
@pytest.mark.parametrize("partition", [random_partition(11, 4), Partition.equal(11, 3)], ids=["uneven", "equal"])
def test_any_choice_of_blocks_is_what_the_loops_give(
    gated: bool, bias: bool, activation: int, partition: Partition
) -> None:
    torch.manual_seed(1)
    ffn = BlockedFFN(random_network(7, 11, gated=gated, bias=bias, activation=activation), partition)
    on = [[bool(mask >> n & 1) for n in range(4)] for mask in range(16)]  # every subset of four blocks
    x = torch.randn(16, 7, dtype=torch.float64)
    expected = looped_ffn(x, on, ffn.weights, partition.edges)
    torch.testing.assert_close(blocked_ffn(ffn, x, Subset(torch.tensor(on))), expected, **EXACT)
    widths = torch.arange(16) % 5
    expected = looped_ffn(x, [[n < width for n in range(4)] for width in widths.tolist()], ffn.weights, partition.edges)
    torch.testing.assert_close(blocked_ffn(ffn, x, Prefix(widths)), expected, **EXACT)


@pytest.mark.parametrize("choice", [Prefix(torch.zeros(3, dtype=torch.int64)), Subset(torch.zeros(3, 2) > 0)])
def test_no_block_is_the_down_bias_or_zeros(choice: Choice) -> None:
    x = torch.randn(3, 7, dtype=torch.float64)
    biased, plain = (BlockedFFN(random_network(7, 11, bias=bias), Partition.at((0, 5, 11))) for bias in (True, False))
    assert biased.weights.down_bias is not None
    assert torch.equal(blocked_ffn(biased, x, choice), biased.weights.down_bias.expand(3, 7))
    assert torch.equal(blocked_ffn(plain, x, choice), torch.zeros(3, 7, dtype=torch.float64))
    assert torch.equal(biased.no_blocks(x), blocked_ffn(biased, x, choice))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.sampled_from(sorted(partitions(77))), st.booleans(), st.integers(0, 1000))
def test_weights_of_zero_and_one_are_the_subset(tokens: int, cut: str, gated: bool, seed: int) -> None:
    torch.manual_seed(seed)
    ffn = BlockedFFN(random_network(13, 77, gated=gated, bias=True, seed=seed), partitions(77)[cut])
    x, subset = torch.randn(tokens, 13, dtype=torch.float64), random_choice(Subset, tokens, ffn.partition.blocks)
    found = blocked_ffn(ffn, x, Soft(subset.mask(ffn.partition.blocks).float()))
    torch.testing.assert_close(found, blocked_ffn(ffn, x, subset), **EXACT)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(partitions(77))), st.integers(0, 1000))
def test_soft_weights_multiply_whole_blocks(cut: str, seed: int) -> None:
    partition = partitions(77)[cut]
    hidden = torch.randn(4, 77, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    soft = random_choice(Soft, 4, partition.blocks, seed=seed)
    found = select(hidden, soft, partition)
    for n, (start, stop) in enumerate(zip(partition.edges, partition.edges[1:], strict=False)):
        weight = soft.mask(partition.blocks)[:, n : n + 1]
        torch.testing.assert_close(found[:, start:stop], hidden[:, start:stop] * weight, **EXACT)


@pytest.mark.parametrize("cut", sorted(CUTS))
@pytest.mark.parametrize("gated", [True, False])
def test_gradients_of_soft_weights(gated: bool, cut: str) -> None:
    torch.manual_seed(2)
    ffn = BlockedFFN(random_network(5, 9, gated=gated, bias=True), CUTS[cut])
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(4, ffn.partition.blocks, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, weight: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return blocked_ffn(ffn, x, Soft(weight))

    assert torch.autograd.gradcheck(run, (x, weight, *parts_of(ffn.weights)))


@pytest.mark.parametrize("cut", sorted(CUTS))
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", [Prefix, Subset])
def test_gradients_of_hard_choices(kind: type[Choice], gated: bool, cut: str) -> None:
    torch.manual_seed(3)
    ffn = BlockedFFN(random_network(5, 9, gated=gated, bias=True), CUTS[cut])
    x, choice = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), random_choice(kind, 4, ffn.partition.blocks)

    def run(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return blocked_ffn(ffn, x, choice)

    assert torch.autograd.gradcheck(run, (x, *parts_of(ffn.weights)))


@pytest.mark.parametrize("cut", sorted(CUTS))
@pytest.mark.parametrize("kind", [Prefix, Subset, Soft])
def test_gradients_of_selecting(kind: type[Choice], cut: str) -> None:
    """Training puts only this step between its own projections; tokens come as (B, T)."""
    partition, hidden = CUTS[cut], torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)
    flat = random_choice(kind, 6, partition.blocks)
    if isinstance(flat, Soft):
        weight = flat.weight.view(2, 3, -1).requires_grad_()
        assert torch.autograd.gradcheck(lambda h, w: select(h, Soft(w), partition), (hidden, weight))
        return
    choice = Prefix(flat.widths.view(2, 3)) if isinstance(flat, Prefix) else Subset(flat.mask(0).view(2, 3, -1))
    assert torch.autograd.gradcheck(lambda h: select(h, choice, partition), (hidden,))
    gradient = torch.autograd.grad(select(hidden, choice, partition).sum(), hidden)[0]
    assert torch.equal(gradient, partition.spread(choice.mask(partition.blocks)).double()), "1 where used, else 0"


def test_the_gradient_of_a_weight_reaches_only_its_block() -> None:
    ffn = BlockedFFN(random_network(5, 9), Partition.at((0, 2, 3, 9)))
    x = torch.randn(1, 5, dtype=torch.float64)
    weight = torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    blocked_ffn(ffn, x, Soft(weight)).sum().backward()
    first = blocked_ffn(ffn, x, Prefix(torch.tensor([1]))).sum()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0, 0], first, **EXACT)


@pytest.mark.parametrize("size", [4, 5, 1])
def test_an_infinite_neuron_of_an_unused_block_stays_out(size: int) -> None:
    ffn = BlockedFFN(random_network(5, 9), Partition.equal(9, size))
    ffn.weights.up[8] = torch.inf
    x, blocks = torch.randn(3, 5, dtype=torch.float64), ffn.partition.blocks
    widths = torch.tensor([0, 1, blocks - 1])
    for choice in (Prefix(widths), Subset(Prefix(widths).mask(blocks))):
        assert blocked_ffn(ffn, x, choice).isfinite().all()
    assert not blocked_ffn(ffn, x, Prefix(widths + 1)).isfinite().all()


def test_an_unused_infinite_neuron_gets_no_gradient() -> None:
    ffn = BlockedFFN(random_network(5, 9), Partition.at((0, 4, 9)))
    hidden = hidden_neurons(torch.randn(2, 5, dtype=torch.float64), ffn.weights)
    hidden[:, 7] = torch.inf
    hidden.requires_grad_()
    kept = select(hidden, Prefix(torch.tensor([1, 1])), ffn.partition)
    gradient = torch.autograd.grad(kept.square().sum(), hidden)[0]
    assert gradient.isfinite().all()
    assert not gradient[:, 4:].any()
