"""Choices: three ways to say what a token uses agree where they say the same."""

from __future__ import annotations

import pytest
import torch
from ffn_networks import partitions, random_choice
from hypothesis import given
from hypothesis import strategies as st

from dynaconv.kernels.choice import Choice, Prefix, Soft, Subset
from dynaconv.kernels.partition import Partition

CUT = partitions(77)
KINDS: list[type[Choice]] = [Prefix, Subset, Soft]


@given(st.lists(st.integers(0, 77), min_size=1, max_size=20), st.sampled_from(sorted(CUT)))
def test_a_prefix_is_the_subset_of_its_first_blocks(widths: list[int], cut: str) -> None:
    partition = CUT[cut]
    prefix = Prefix(torch.tensor(widths).clamp(max=partition.blocks))
    subset, soft = Subset(prefix.mask(partition.blocks)), Soft(prefix.mask(partition.blocks).double())
    assert subset.on.tolist() == [[n < width for n in range(partition.blocks)] for width in prefix.widths.tolist()]
    assert torch.equal(soft.mask(partition.blocks).bool(), subset.on)
    for other in (subset, soft):
        assert torch.equal(other.width(), prefix.width())
        torch.testing.assert_close(other.active_share(partition), prefix.active_share(partition))


@pytest.mark.parametrize("cut", sorted(CUT))
@pytest.mark.parametrize("kind", [Subset, Soft])
def test_the_active_share_counts_neurons(kind: type[Choice], cut: str) -> None:
    partition = CUT[cut]
    choice = random_choice(kind, 30, partition.blocks)
    on = choice.mask(partition.blocks) > 0.5
    expected = partition.spread(on).double().mean(-1)
    found = choice.active_share(partition)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected)
    assert torch.equal(choice.width(), on.sum(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_keep_every_token_in_order(kind: type[Choice]) -> None:
    flat = random_choice(kind, 12, 5)
    if isinstance(flat, Prefix):
        shaped: Choice = Prefix(flat.widths.view(3, 4))
    else:
        shaped = kind(flat.mask(5).view(3, 4, 5))  # type: ignore[call-arg]
    assert torch.equal(shaped.rows().mask(5), flat.mask(5))
    assert torch.equal(shaped.width(), flat.width().view(3, 4))
    torch.testing.assert_close(
        shaped.active_share(Partition.equal(20, 4)), flat.active_share(Partition.equal(20, 4)).view(3, 4)
    )


def test_a_weight_counts_as_used_above_one_half() -> None:
    soft = Soft(torch.tensor([[0.5, 0.51, 0.0, 1.0]], requires_grad=True))
    assert soft.width().tolist() == [2]
    assert soft.active_share(Partition.equal(8, 2)).tolist() == [0.5]
    assert not soft.active_share(Partition.equal(8, 2)).requires_grad
