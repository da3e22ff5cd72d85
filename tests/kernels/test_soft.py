"""Weighted blocks, as training uses them: each neuron times the weight of its block, for blocks of any sizes."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from dynaconv.kernels.choice import Soft
from dynaconv.kernels.partition import Partition
from dynaconv.kernels.reference import select

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=9)
PARTITIONS = st.one_of(
    SIZES.map(lambda sizes: Partition.at((0, *accumulate(sizes)))),
    st.integers(1, 30).flatmap(
        lambda neurons: st.integers(1, neurons).map(lambda size: Partition.equal(neurons, size))
    ),
)


@given(PARTITIONS)
def test_runs_cover_all_blocks_and_are_of_one_size(partition: Partition) -> None:
    blocks = [block for first, stop in partition.runs for block in range(first, stop)]
    assert blocks == list(range(partition.blocks))
    sizes = [set(partition.sizes[first:stop]) for first, stop in partition.runs]
    assert all(len(found) == 1 for found in sizes)
    assert all(one != other for one, other in pairwise(sizes)), "as few runs as there can be"


@given(PARTITIONS, st.integers(0, 5))
def test_outputs_and_gradients_are_those_of_a_weight_a_neuron(partition: Partition, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 2, partition.neurons, generator=generator, requires_grad=True)
    weight = torch.rand(tokens, 2, partition.blocks, generator=generator, requires_grad=True)
    signal = torch.randn(tokens, 2, partition.neurons, generator=generator)
    found = select(hidden, Soft(weight), partition)
    sizes = torch.tensor(partition.sizes)
    expected = hidden * weight.repeat_interleave(sizes, dim=-1)
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(found, (hidden, weight), signal)
    theirs = torch.autograd.grad(expected, (hidden, weight), signal)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
