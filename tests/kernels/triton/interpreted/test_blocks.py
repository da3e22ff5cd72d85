"""The GPU backend of blocks, run by Triton's interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch
from ffn_networks import partitions, random_choice, random_network
from torch.nn.functional import gelu

from dynaconv.kernels import triton_blocks
from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Choice, Prefix, Soft, Subset
from dynaconv.kernels.partition import Partition
from dynaconv.kernels.reference import blocked_ffn
from dynaconv.kernels.triton_blocks import TRITON, can_run
from dynaconv.kernels.weights import FFNWeights

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def weights(columns: int, neurons: int, dtype: torch.dtype = torch.float32, **settings: bool) -> FFNWeights:
    return random_network(columns, neurons, dtype=dtype, **settings)


def tokens(count: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(5)).to(dtype)


def agree(ffn: BlockedFFN, x: torch.Tensor, choice: Choice) -> torch.Tensor:
    """Equal to the reference in float32, but for rounding of the result's dtype."""
    able, reason = can_run(ffn, x, choice)
    assert able, reason
    found = TRITON.run(ffn, x, choice)
    exact = FFNWeights(*(one.float() if isinstance(one, torch.Tensor) else one for one in ffn.weights))
    expected = blocked_ffn(BlockedFFN(exact, ffn.partition), x.float(), choice)
    assert found.dtype == x.dtype
    assert (found.float() - expected).norm() <= DTYPES[x.dtype] * expected.norm().clamp_min(1e-6)
    return found


@pytest.mark.parametrize(("kind", "grain"), zip((Prefix, Subset, Prefix, Subset, Subset), partitions(77), strict=True))
def test_few_tokens_of_every_grain(kind: type[Choice], grain: str) -> None:
    partition = partitions(77)[grain]
    ffn = BlockedFFN(weights(63, 77), partition)
    agree(ffn, tokens(3, 63), random_choice(kind, 3, partition.blocks))


@pytest.mark.parametrize("count", [2, 20])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
def test_dtypes_and_biases(count: int, dtype: torch.dtype, gated: bool) -> None:
    partition = Partition.equal(13, 4)
    ffn = BlockedFFN(weights(63, 13, dtype, gated=gated, bias=True), partition)
    agree(ffn, tokens(count, 63, dtype), random_choice(Prefix, count, partition.blocks))


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("count", [1, 17])
def test_activations(name: str, count: int) -> None:
    functions = {
        "gelu": gelu,
        "gelu_pytorch_tanh": torch.nn.GELU(approximate="tanh"),
        "relu": torch.nn.ReLU(),
    }
    partition = partitions(33)["of 16, the last smaller"]
    ffn = BlockedFFN(weights(40, 33)._replace(activation=functions[name]), partition)
    agree(ffn, tokens(count, 40), random_choice(Prefix, count, partition.blocks))


@pytest.mark.parametrize("width", [0, 2, 5])
def test_a_staircase_of_one_width(width: int) -> None:
    """Nothing, some and all, at several tiles of tokens, columns and neurons."""
    partition = partitions(77)["of 16, the last smaller"]
    ffn = BlockedFFN(weights(96, 77), partition)
    found = agree(ffn, tokens(40, 96), Prefix(torch.full((40,), width)))
    assert width > 0 or not found.any()


def test_no_token_and_no_block() -> None:
    partition = partitions(33)["neurons one by one"]
    ffn = BlockedFFN(weights(40, 33, bias=True), partition)
    found = agree(ffn, tokens(2, 40), Subset(torch.zeros(2, 33, dtype=torch.bool)))
    assert torch.equal(found, ffn.weights.down_bias.expand(2, -1))
    assert TRITON.run(ffn, tokens(0, 40), Subset(torch.zeros(0, 33, dtype=torch.bool))).shape == (0, 40)


@pytest.mark.parametrize("kind", [Prefix, Subset])
def test_rows_do_not_see_their_batch(kind: type[Choice]) -> None:
    """The same bits alone and in batches of other sizes; tokens of a batch use none, some and all blocks."""
    partition = Partition.equal(13, 1)
    ffn = BlockedFFN(weights(63, 13), partition)
    x, on = tokens(5, 63), random_choice(Subset, 5, 13).on
    on[0], on[4] = False, True
    chosen = on.sum(1) if kind is Prefix else on
    together = agree(ffn, x, kind(chosen))
    for first, stop in ((1, 2), (3, 5)):
        assert torch.equal(TRITON.run(ffn, x[first:stop], kind(chosen[first:stop])), together[first:stop])


def test_down_is_copied_once_where_it_does_not_lie_in_rows() -> None:
    partition, x = partitions(33)["neurons one by one"], tokens(1, 40)
    network, choice = weights(40, 33), random_choice(Subset, 1, 33)
    copied = triton_blocks.down_rows(network)
    assert triton_blocks.down_rows(network) is copied
    before = agree(BlockedFFN(network, partition), x, choice)
    rows = network._replace(down=network.down.t().contiguous().t())
    assert triton_blocks.down_rows(rows).data_ptr() == rows.down.data_ptr()
    assert torch.equal(agree(BlockedFFN(rows, partition), x, choice), before)
    network.down.mul_(2)
    assert torch.allclose(agree(BlockedFFN(network, partition), x, choice), 2 * before)


def test_what_it_refuses() -> None:
    partition, x, network = partitions(33)["neurons one by one"], tokens(20, 40), weights(40, 33)
    ffn, first = BlockedFFN(network, partition), random_choice(Prefix, 20, 33)
    assert "weighted" in can_run(ffn, x, Soft(torch.rand(20, 33)))[1]
    assert "more than 16 tokens" in can_run(ffn, x, random_choice(Subset, 20, 33))[1]
    assert "low-bit" in can_run(BlockedFFN(network, partition, network), x, first)[1]
    assert "means" in can_run(BlockedFFN(network, partition, None, x.new_zeros(33)), x, first)[1]
    assert "activation" in can_run(BlockedFFN(network._replace(activation=torch.sin), partition), x, first)[1]
