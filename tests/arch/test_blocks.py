"""Blocks cover every neuron once, whatever the size of the FFN."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynaconv.arch.blocks import ffn_partition, nested_partition, partition_text, routed_partition
from dynaconv.config import RunConfig
from dynaconv.errors import ConfigError


@given(neurons=st.integers(1, 50_000), blocks=st.integers(1, 64) | st.integers(65, 20_000))
def test_nested_blocks_cover_every_neuron_once_in_granules(neurons: int, blocks: int) -> None:
    if blocks > neurons:
        with pytest.raises(ConfigError, match=f"have {neurons} neurons"):
            nested_partition(neurons, blocks)
        return
    edges = nested_partition(neurons, blocks).edges
    sizes = [stop - start for start, stop in pairwise(edges)]
    granule = 128 if neurons >= 128 * blocks else 16 if neurons >= 16 * blocks else 1
    assert (edges[0], edges[-1], len(sizes)) == (0, neurons, blocks)
    assert min(sizes) > 0
    assert all(edge % granule == 0 for edge in edges[:-1])
    assert max(abs(size - neurons / blocks) for size in sizes) <= granule


@pytest.mark.parametrize(
    ("neurons", "blocks", "expected"),
    [
        (1024, 8, tuple(range(0, 1025, 128))),
        (1024, None, tuple(range(0, 1025, 128))),
        (5, None, (0, 1, 2, 3, 4, 5)),
        (96, 4, (0, 32, 48, 80, 96)),
        (99, 2, (0, 48, 99)),
        (7, 3, (0, 2, 5, 7)),
        (14336, 2, (0, 7168, 14336)),
    ],
)
def test_edges_of_known_sizes(neurons: int, blocks: int | None, expected: tuple[int, ...]) -> None:
    assert nested_partition(neurons, blocks).edges == expected


@given(neurons=st.integers(1, 20_000), block_size=st.integers(1, 300))
def test_routed_blocks_are_of_one_size_but_for_the_last(neurons: int, block_size: int) -> None:
    if block_size > neurons:
        with pytest.raises(ConfigError, match=f"have {neurons} neurons"):
            routed_partition(neurons, block_size)
        return
    *sizes, last = routed_partition(neurons, block_size).sizes
    assert set(sizes) <= {block_size}
    assert 1 <= last <= block_size
    assert sum(sizes) + last == neurons


@given(neurons=st.integers(1, 50_000))
def test_every_ffn_can_be_cut_by_the_defaults(neurons: int) -> None:
    nested, routed = (ffn_partition(neurons, RunConfig(experts=experts)) for experts in ("nested", "routed"))
    assert nested.blocks == min(8, neurons)
    assert 1 <= routed.block_size <= 16 and (routed.block_size == 16 or neurons < 1024)
    assert routed.blocks >= min(64, neurons)
    assert nested.neurons == routed.neurons == neurons


@pytest.mark.parametrize(
    ("partition", "text"),
    [
        (routed_partition(1536), "30 FFNs of 1536 neurons in 96 blocks of 16"),
        (routed_partition(100, 16), "30 FFNs of 100 neurons in 7 blocks of 16, the last of 4"),
        (routed_partition(9, 9), "30 FFNs of 9 neurons in 1 block of 9"),
        (nested_partition(96, 4), "30 FFNs of 96 neurons in 4 blocks of 16 or 32"),
        (nested_partition(1024), "30 FFNs of 1024 neurons in 8 blocks of 128"),
    ],
)
def test_what_was_chosen_is_said(partition, text: str) -> None:
    assert partition_text(30, partition) == text


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("cut", [nested_partition, routed_partition])
def test_less_than_one_is_refused(cut, number: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        cut(100_000, number)
