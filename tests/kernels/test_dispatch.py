"""Which backend runs when, why, and that each gives the reference's result."""

from __future__ import annotations

import pytest
import torch
from ffn_networks import partitions, random_choice, random_network, random_partition
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaconv.kernels import dispatch
from dynaconv.kernels.backend import Backend
from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Choice, Prefix, Soft, Subset
from dynaconv.kernels.dispatch import BACKENDS, blocked_ffn, decide
from dynaconv.kernels.partition import Partition
from dynaconv.kernels.reference import REFERENCE
from dynaconv.kernels.reference import blocked_ffn as truth

PARTITION = Partition.at((0, 3, 7, 20, 21))
EXACT = {"rtol": 0.0, "atol": 1e-12}


def network(partition: Partition = PARTITION, width: int = 9, **settings: bool | int) -> BlockedFFN:
    return BlockedFFN(random_network(width, partition.neurons, **settings), partition)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("widths", "kernel"),
    [
        ([4, 4, 4], "prefix"),
        ([4], "prefix"),
        ([2, 2], "prefix"),
        ([2], "prefix"),
        ([0], "prefix"),
        ([0, 0], "prefix"),
        ([4, 3], "capped"),
        ([0, 2, 1], "capped"),
        ([], "prefix"),
    ],
)
def test_the_kernel_follows_from_the_widths(widths: list[int], kernel: str) -> None:
    ffn, choice = network(bias=True), Prefix(torch.tensor(widths, dtype=torch.int64))
    x = torch.randn(len(widths), 9, dtype=torch.float64)
    decision = decide(ffn, x, choice)
    assert decision.backend.name == "cpu-nested"
    assert decision.backend.variant(ffn, x, choice) == kernel
    assert decision.reason
    torch.testing.assert_close(blocked_ffn(ffn, x, choice), truth(ffn, x, choice), **EXACT)


def test_many_tokens_take_the_staircase() -> None:
    ffn = network(Partition.at((0, 30, 60, 77)), 63)
    few, many = Prefix(torch.tensor([3, 1, 0, 2])), Prefix(torch.tensor([3, 1, 0, 2] * 200))
    backend = decide(ffn, torch.randn(4, 63, dtype=torch.float64), few).backend
    assert backend.variant(ffn, torch.randn(4, 63, dtype=torch.float64), few) == "capped"
    x = torch.randn(800, 63, dtype=torch.float64)
    assert backend.variant(ffn, x, many) == "staircase"
    torch.testing.assert_close(blocked_ffn(ffn, x, many), truth(ffn, x, many), **EXACT)


@pytest.mark.parametrize(("kind", "name"), [(Prefix, "cpu-nested"), (Subset, "cpu-routed"), (Soft, "reference")])
def test_the_backend_follows_from_the_choice_and_says_why(kind: type[Choice], name: str) -> None:
    ffn, x = network(bias=True), torch.randn(6, 9, dtype=torch.float64)
    decision = decide(ffn, x, random_choice(kind, 6, 4))
    assert decision.backend.name == name
    earlier = [backend.name for backend in BACKENDS[: BACKENDS.index(decision.backend)]]
    assert list(decision.passed_over) == earlier
    assert all(decision.passed_over.values())
    assert decision.reason


@pytest.mark.parametrize("kind", [Prefix, Subset])
@pytest.mark.parametrize("who", ["x", "up", "down_bias"])
def test_a_wanted_gradient_takes_the_reference(kind: type[Choice], who: str) -> None:
    ffn, choice = network(bias=True), random_choice(kind, 2, 4)
    x = torch.randn(2, 9, dtype=torch.float64)
    wants = x if who == "x" else getattr(ffn.weights, who)
    wants.requires_grad_()
    assert decide(ffn, x, choice).backend is REFERENCE
    assert "gradient" in decide(ffn, x, choice).reason
    blocked_ffn(ffn, x, choice).sum().backward()
    found, wants.grad = wants.grad, None
    truth(ffn, x, choice).sum().backward()
    torch.testing.assert_close(found, wants.grad, **EXACT)
    with torch.no_grad():
        assert decide(ffn, x, choice).backend is not REFERENCE
        assert not blocked_ffn(ffn, x, choice).requires_grad


@pytest.mark.parametrize("kind", [Prefix, Subset, Soft])
def test_deciding_looks_at_no_value(kind: type[Choice]) -> None:
    """Tensors on ``meta`` have none, and on a GPU looking at one would wait for the device."""
    ffn = network(bias=True)
    moved = (part.to("meta") if isinstance(part, torch.Tensor) else part for part in ffn.weights)
    there = BlockedFFN(type(ffn.weights)(*moved), PARTITION)  # type: ignore[arg-type]
    given = random_choice(kind, 2, 4)
    choice = kind(given.width().to("meta") if kind is Prefix else given.mask(4).to("meta"))  # type: ignore[call-arg]
    decision = decide(there, torch.empty(2, 9, dtype=torch.float64, device="meta"), choice)
    assert decision.backend is REFERENCE
    assert blocked_ffn(there, torch.empty(2, 9, dtype=torch.float64, device="meta"), choice).shape == (2, 9)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([Prefix, Subset, Soft]),
    tokens=st.integers(0, 20),
    blocks=st.integers(1, 77),
    gated=st.booleans(),
    bias=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_choice_gives_the_references_result(
    kind: type[Choice], tokens: int, blocks: int, gated: bool, bias: bool, transposed: bool, seed: int
) -> None:
    ffn = network(random_partition(77, blocks, seed), 31, gated=gated, bias=bias, seed=seed)
    choice = random_choice(kind, tokens, blocks, seed=seed)
    x = torch.randn(tokens, 31, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = blocked_ffn(down_transposed(ffn) if transposed else ffn, x, choice)
    assert not found.isnan().any()
    torch.testing.assert_close(found, truth(ffn, x, choice), **EXACT)


@pytest.mark.parametrize("kind", [Prefix, Subset, Soft])
@pytest.mark.parametrize("cut", sorted(partitions(77)))
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_down_may_lie_transposed(kind: type[Choice], cut: str, tokens: int) -> None:
    ffn = network(partitions(77)[cut], 63, bias=True)
    choice, x = random_choice(kind, tokens, ffn.partition.blocks), torch.randn(tokens, 63, dtype=torch.float64)
    torch.testing.assert_close(blocked_ffn(down_transposed(ffn), x, choice), truth(ffn, x, choice), **EXACT)


def down_transposed(ffn: BlockedFFN) -> BlockedFFN:
    down = ffn.weights.down.t().contiguous().t()
    assert down.stride() == (1, down.shape[0])
    assert torch.equal(down, ffn.weights.down)
    return BlockedFFN(ffn.weights._replace(down=down), ffn.partition)


@given(st.integers(1, 4), st.integers(1, 4))
def test_turning_a_token_up_never_changes_what_it_had(low: int, more: int) -> None:
    """Nesting: the wider result is the narrower one plus the blocks between."""
    ffn = network(Partition.at((0, 3, 5, 7, 9, 11, 13, 20, 21)), seed=low)
    x, blocks = torch.randn(1, 9, dtype=torch.float64), torch.arange(8)[None]
    narrow = blocked_ffn(ffn, x, Prefix(torch.tensor([low])))
    wide = blocked_ffn(ffn, x, Prefix(torch.tensor([low + more])))
    added = truth(ffn, x, Subset((blocks >= low) & (blocks < low + more)))
    torch.testing.assert_close(wide, narrow + added, **EXACT)


def test_a_new_backend_is_one_object_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """CONTRIBUTING shows how; ``BACKENDS`` is where the line goes."""

    def can_run(ffn: BlockedFFN, x: torch.Tensor, choice: Choice) -> tuple[bool, str]:
        if len(x) % 2:
            return False, "the number of tokens is odd"
        return True, "the number of tokens is even"

    def run(ffn: BlockedFFN, x: torch.Tensor, choice: Choice) -> torch.Tensor:
        return torch.cat([truth(ffn, x[::2], half(choice, 0)), truth(ffn, x[1::2], half(choice, 1))])

    def half(choice: Choice, first: int) -> Choice:
        assert isinstance(choice, Prefix)
        return Prefix(choice.widths[first::2])

    pairs = Backend("pairs", can_run, run)
    monkeypatch.setattr(dispatch, "BACKENDS", [pairs, *BACKENDS])
    ffn, x, choice = network(), torch.randn(6, 9, dtype=torch.float64), Prefix(torch.tensor([4, 0, 1, 2, 2, 3]))
    assert decide(ffn, x, choice).backend is pairs
    assert decide(ffn, x, choice).reason == "the number of tokens is even"
    order = torch.tensor([0, 2, 4, 1, 3, 5])
    torch.testing.assert_close(blocked_ffn(ffn, x, choice), truth(ffn, x, choice)[order], **EXACT)
    odd = decide(ffn, x[:5], Prefix(choice.widths[:5]))
    assert odd.backend is not pairs
    assert next(iter(odd.passed_over.items())) == ("pairs", "the number of tokens is odd")
