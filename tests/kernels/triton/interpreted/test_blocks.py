"""The GPU backend of blocks, run by Triton's interpreter, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ffn_networks import partitions, random_choice

from dynaconv.kernels import triton_blocks
from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Choice, Prefix, Soft, Subset
from dynaconv.kernels.reference import blocked_ffn
from dynaconv.kernels.triton_blocks import TRITON, can_run
from dynaconv.kernels.weights import FFNWeights

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def agree(ffn: BlockedFFN, x: torch.Tensor, choice: Choice) -> torch.Tensor:
    """Equal to the reference in float32, but for rounding of the result's dtype."""
    able, reason = can_run(ffn, x, choice)
    assert able, reason
    found = TRITON.run(ffn, x, choice)
    exact = FFNWeights(*(one.float() if isinstance(one, torch.Tensor) else one for one in ffn.weights))
    mean = None if ffn.mean is None else ffn.mean.float()
    expected = blocked_ffn(BlockedFFN(exact, ffn.partition, None, mean), x.float(), choice)
    assert found.dtype == x.dtype
    assert (found.float() - expected).norm() <= DTYPES[x.dtype] * expected.norm().clamp_min(1e-6)
    return found


@pytest.mark.parametrize("kind", [Prefix, Subset])
@pytest.mark.parametrize("grain", partitions(77))
def test_few_tokens_of_every_grain(networks: Any, kind: type[Choice], grain: str) -> None:
    partition = partitions(77)[grain]
    ffn = BlockedFFN(networks.weights(63, 77, torch.nn.functional.silu), partition)
    agree(ffn, networks.tokens(3, 63), random_choice(kind, 3, partition.blocks))


@pytest.mark.parametrize("count", [2, 20])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
def test_dtypes_biases_and_means(networks: Any, count: int, dtype: torch.dtype, gated: bool) -> None:
    partition = partitions(77)["of 16, the last smaller"]
    weights = networks.weights(63, 77, torch.nn.functional.silu, dtype, gated=gated, biased=True)
    for mean in (None, networks.tokens(1, 77, dtype, seed=3)[0]):
        ffn = BlockedFFN(weights, partition, None, mean)
        agree(ffn, networks.tokens(count, 63, dtype), random_choice(Prefix, count, partition.blocks))


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("count", [1, 17])
def test_activations(networks: Any, name: str, count: int) -> None:
    functions = {
        "gelu": torch.nn.functional.gelu,
        "gelu_pytorch_tanh": torch.nn.GELU(approximate="tanh"),
        "relu": torch.nn.ReLU(),
    }
    partition = partitions(33)["of 16, the last smaller"]
    ffn = BlockedFFN(networks.weights(40, 33, functions[name]), partition)
    agree(ffn, networks.tokens(count, 40), random_choice(Prefix, count, partition.blocks))


@pytest.mark.parametrize("width", [0, 2, 5])
def test_a_staircase_of_one_width(networks: Any, width: int) -> None:
    """Nothing, some and all, at several tiles of tokens, columns and neurons."""
    partition = partitions(77)["of 16, the last smaller"]
    ffn = BlockedFFN(networks.weights(96, 77, torch.nn.functional.silu), partition)
    found = agree(ffn, networks.tokens(40, 96), Prefix(torch.full((40,), width)))
    assert width > 0 or not found.any()


def test_no_token_and_no_block(networks: Any) -> None:
    partition = partitions(33)["neurons one by one"]
    ffn = BlockedFFN(networks.weights(40, 33, torch.nn.functional.silu, biased=True), partition)
    found = agree(ffn, networks.tokens(2, 40), Subset(torch.zeros(2, 33, dtype=torch.bool)))
    assert torch.equal(found, ffn.weights.down_bias.expand(2, -1))
    assert TRITON.run(ffn, networks.tokens(0, 40), Subset(torch.zeros(0, 33, dtype=torch.bool))).shape == (0, 40)


@pytest.mark.parametrize("kind", [Prefix, Subset])
def test_rows_do_not_see_their_batch(networks: Any, kind: type[Choice]) -> None:
    """The same bits alone and in batches of other sizes; tokens of a batch use none, some and all blocks."""
    partition = partitions(33)["neurons one by one"]
    ffn = BlockedFFN(networks.weights(63, 33, torch.nn.functional.silu), partition)
    x, on = networks.tokens(6, 63), random_choice(Subset, 6, 33).on
    on[0], on[5] = False, True
    chosen = on.sum(1) if kind is Prefix else on
    together = agree(ffn, x, kind(chosen))
    for first, stop in ((1, 2), (4, 6)):
        assert torch.equal(TRITON.run(ffn, x[first:stop], kind(chosen[first:stop])), together[first:stop])


def test_down_is_copied_once_where_it_does_not_lie_in_rows(networks: Any) -> None:
    partition, x = partitions(33)["neurons one by one"], networks.tokens(1, 40)
    weights = networks.weights(40, 33, torch.nn.functional.silu)
    choice = random_choice(Subset, 1, 33)
    copied = triton_blocks.down_rows(weights)
    assert triton_blocks.down_rows(weights) is copied
    before = agree(BlockedFFN(weights, partition), x, choice)
    rows = weights._replace(down=weights.down.t().contiguous().t())
    assert triton_blocks.down_rows(rows).data_ptr() == rows.down.data_ptr()
    assert torch.equal(agree(BlockedFFN(rows, partition), x, choice), before)
    weights.down.mul_(2)
    assert torch.allclose(agree(BlockedFFN(weights, partition), x, choice), 2 * before)


def test_what_it_refuses(networks: Any) -> None:
    partition, x = partitions(33)["neurons one by one"], networks.tokens(20, 40)
    weights = networks.weights(40, 33, torch.nn.functional.silu)
    ffn = BlockedFFN(weights, partition)
    assert "weighted" in can_run(ffn, x, Soft(torch.rand(20, 33)))[1]
    assert "more than 16 tokens" in can_run(ffn, x, random_choice(Subset, 20, 33))[1]
    assert "low-bit" in can_run(BlockedFFN(weights, partition, weights), x, random_choice(Prefix, 20, 33))[1]
    assert "of their own" in can_run(BlockedFFN(weights, partition, None, x.new_zeros(20, 33)), x, Prefix(x[:, 0]))[1]
    assert "activation" in can_run(BlockedFFN(weights._replace(activation=torch.sin), partition), x, Prefix(x[:, 0]))[1]
