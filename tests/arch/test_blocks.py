"""Edges cover every neuron once, whatever the size."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynaconv.arch.blocks import block_edges
from dynaconv.errors import ConfigError


@given(neurons=st.integers(1, 50_000), blocks=st.integers(1, 64))
def test_blocks_cover_every_neuron_once_in_granules(neurons: int, blocks: int) -> None:
    if blocks > neurons:
        with pytest.raises(ConfigError, match=f"have {neurons} neurons"):
            block_edges(neurons, blocks)
        return
    edges = block_edges(neurons, blocks)
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
        (96, 4, (0, 32, 48, 80, 96)),
        (99, 2, (0, 48, 99)),
        (7, 3, (0, 2, 5, 7)),
        (14336, 2, (0, 7168, 14336)),
    ],
)
def test_edges_of_known_sizes(neurons: int, blocks: int, expected: tuple[int, ...]) -> None:
    assert block_edges(neurons, blocks) == expected


@pytest.mark.parametrize(("neurons", "blocks"), [(1024, 64), (96, 6), (14336, 64), (11008, 32), (7, 7)])
def test_blocks_of_routed_experts_are_alike(neurons: int, blocks: int) -> None:
    edges = block_edges(neurons, blocks, "routed")
    assert {stop - start for start, stop in pairwise(edges)} == {neurons // blocks}
    assert (edges[0], edges[-1], len(edges)) == (0, neurons, blocks + 1)


def test_blocks_that_cannot_be_alike_are_refused_with_those_that_can() -> None:
    with pytest.raises(ConfigError, match=r"11008 neurons(.|\n)*blocks=32 or blocks=43"):
        block_edges(11008, 40, "routed")
    with pytest.raises(ConfigError, match="blocks=1 or blocks=61"):
        block_edges(61, 8, "routed")


@pytest.mark.parametrize("blocks", [0, -1, 65])
def test_out_of_range_is_refused(blocks: int) -> None:
    with pytest.raises(ConfigError, match="from 1 to 64"):
        block_edges(100_000, blocks)
