"""Partitions: exact covers, what a loop over blocks gives, round trips, and refusals."""

from __future__ import annotations

import json
import pickle
from itertools import pairwise

import pytest
import torch
from ffn_networks import partitions
from hypothesis import given
from hypothesis import strategies as st

from dynaconv.kernels.partition import Partition

EQUAL = st.integers(1, 700).flatmap(
    lambda neurons: st.builds(Partition.equal, st.just(neurons), st.integers(1, neurons))
)
UNEVEN = st.sets(st.integers(1, 700), min_size=1, max_size=300).map(lambda cuts: Partition.at((0, *sorted(cuts))))
ANY = EQUAL | UNEVEN


@given(ANY)
def test_blocks_cover_every_neuron_once(partition: Partition) -> None:
    assert partition.edges[0] == 0
    assert partition.edges[-1] == partition.neurons
    assert all(a < b for a, b in pairwise(partition.edges))
    assert partition.sizes == tuple(b - a for a, b in pairwise(partition.edges))
    assert len(partition.sizes) == partition.blocks == len(partition.edges) - 1
    same = len(set(partition.sizes)) == 1
    assert partition.uniform_size == (partition.sizes[0] if same else None)


@given(st.integers(1, 700), st.data())
def test_equal_blocks_have_their_size_and_the_last_what_is_left(neurons: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, neurons))
    partition = Partition.equal(neurons, size)
    assert set(partition.sizes[:-1]) <= {size}
    assert 1 <= partition.sizes[-1] <= size


@given(ANY, st.sampled_from([(), (3,), (2, 3)]), st.integers(0, 100))
def test_spread_is_what_a_loop_gives(partition: Partition, tokens: tuple[int, ...], seed: int) -> None:
    on = torch.rand(*tokens, partition.blocks, generator=torch.Generator().manual_seed(seed)) < 0.5
    for entries in (on, on.double() * 3):
        expected = torch.cat(
            [entries[..., n : n + 1].expand(*tokens, size) for n, size in enumerate(partition.sizes)], -1
        )
        assert torch.equal(partition.spread(entries), expected)


@given(ANY)
def test_shares_add_up_to_one(partition: Partition) -> None:
    shares, prefixes = partition.shares(), partition.prefix_shares()
    assert shares.dtype == prefixes.dtype == torch.float64
    torch.testing.assert_close(shares.sum(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(prefixes[1:], shares.cumsum(0))
    assert float(prefixes[0]) == 0.0
    assert float(prefixes[-1]) == 1.0


@given(ANY, st.floats(0, 1))
def test_width_within_is_the_most_that_fits(partition: Partition, budget: float) -> None:
    width, prefixes = partition.width_within(budget), partition.prefix_shares().tolist()
    assert prefixes[width] <= budget + 1e-8
    assert width == partition.blocks or prefixes[width + 1] > budget
    assert partition.width_within(1.0) == partition.blocks


@given(ANY)
def test_json_and_pickle_bring_it_back(partition: Partition) -> None:
    again = Partition.from_json(json.loads(json.dumps(partition.to_json())))
    assert again == partition
    assert hash(again) == hash(partition)
    assert again.edges == partition.edges
    assert pickle.loads(pickle.dumps(partition)) == partition


@pytest.mark.parametrize("name", sorted(partitions(77)))
def test_the_same_blocks_are_equal_however_they_were_cut(name: str) -> None:
    partition = partitions(77)[name]
    assert Partition.at(partition.edges) == partition


@pytest.mark.parametrize("size", [0, -1, 78])
def test_a_block_size_that_does_not_fit_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"block_size is {size}; it must be from 1 to 77"):
        Partition.equal(77, size)


@pytest.mark.parametrize("positions", [(), (0,), (1, 5), (0, 5, 5), (0, 5, 4), (-1, 4)])
def test_positions_that_do_not_ascend_from_zero_are_refused(positions: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must ascend from 0"):
        Partition.at(positions)


@pytest.mark.parametrize(
    "content",
    [
        None,
        7,
        "edges",
        [],
        [0, 5],
        {},
        {"neurons": 5},
        {"neurons": 5, "block_size": 2.0},
        {"neurons": 5, "block_size": True},
        {"neurons": "5", "block_size": 2},
        {"neurons": 5, "block_size": 6},
        {"neurons": 0, "block_size": 0},
        {"edges": None},
        {"edges": [0, 2.5, 5]},
        {"edges": [0, "5"]},
        {"edges": []},
        {"edges": [3, 5]},
    ],
)
def test_damaged_content_is_refused(content: object) -> None:
    with pytest.raises(ValueError, match=r"block_size|edges"):
        Partition.from_json(content)
