"""The operator that compiled code sees: what PyTorch asks of one, the reference's results, and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ffn_networks import random_choice, random_network
from torch.nn.functional import gelu, silu

from dynaconv.kernels import dispatch, op
from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Choice, Prefix, Soft, Subset
from dynaconv.kernels.op import compiled_ffn, register_activation
from dynaconv.kernels.partition import Partition
from dynaconv.kernels.reference import REFERENCE, blocked_ffn

EXACT = {"rtol": 0.0, "atol": 1e-12}
CUTS = {
    "uneven": Partition.at((0, 2, 3, 9)),
    "the last smaller": Partition.equal(9, 4),
    "neurons": Partition.equal(9, 1),
}
register_activation("silu", silu)
register_activation("gelu", gelu)


def arguments(ffn: BlockedFFN, x: torch.Tensor, choice: Choice) -> tuple[Any, ...]:
    chosen = choice.widths if isinstance(choice, Prefix) else choice.on if isinstance(choice, Subset) else choice.weight
    w, p = ffn.weights, ffn.partition
    rest = (w.up, w.down, w.gate, w.up_bias, w.down_bias, w.gate_bias, p.neurons, p.block_size, p.positions, "silu")
    return (x, chosen, *rest)


def wanting(ffn: BlockedFFN) -> list[torch.Tensor]:
    return [part.requires_grad_() for part in ffn.weights if isinstance(part, torch.Tensor)]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", [Prefix, Subset, Soft])
def test_pytorch_finds_nothing_wrong(kind: type[Choice], gated: bool, bias: bool, gradients: bool) -> None:
    ffn = BlockedFFN(random_network(5, 9, gated=gated, bias=bias), CUTS["uneven"])
    x, choice = torch.randn(4, 5, dtype=torch.float64), random_choice(kind, 4, 3)
    if gradients:
        wanting(ffn)
        x.requires_grad_()
        if isinstance(choice, Soft):
            choice.weight.requires_grad_()
    torch.library.opcheck(op.blocked_ffn, arguments(ffn, x, choice))


@pytest.mark.parametrize("cut", sorted(CUTS))
@pytest.mark.parametrize("kind", [Prefix, Subset, Soft])
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_it_is_the_reference(kind: type[Choice], cut: str, tokens: int) -> None:
    ffn = BlockedFFN(random_network(5, 9, bias=True), CUTS[cut])
    x, choice = torch.randn(tokens, 5, dtype=torch.float64), random_choice(kind, tokens, ffn.partition.blocks)
    torch.testing.assert_close(compiled_ffn(ffn, x, choice, "silu"), blocked_ffn(ffn, x, choice), **EXACT)


@pytest.mark.parametrize("cut", sorted(CUTS))
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", [Prefix, Subset, Soft])
def test_gradients(kind: type[Choice], gated: bool, cut: str) -> None:
    torch.manual_seed(2)
    ffn = BlockedFFN(random_network(5, 9, gated=gated, bias=True, activation=1), CUTS[cut])
    x, choice = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), random_choice(kind, 4, ffn.partition.blocks)
    inputs = [x, *wanting(ffn), *([choice.weight.requires_grad_()] if isinstance(choice, Soft) else [])]

    def run(*_: torch.Tensor) -> torch.Tensor:
        return compiled_ffn(ffn, x, choice, "gelu")

    assert torch.autograd.gradcheck(run, inputs)
    found = torch.autograd.grad(run().square().sum(), inputs)
    expected = torch.autograd.grad(blocked_ffn(ffn, x, choice).square().sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_only_what_wants_a_gradient_gets_one() -> None:
    ffn = BlockedFFN(random_network(5, 9, bias=True), CUTS["uneven"])
    ffn.weights.up.requires_grad_()
    x = torch.randn(4, 5, dtype=torch.float64)
    compiled_ffn(ffn, x, Prefix(torch.tensor([3, 1, 0, 2])), "silu").sum().backward()
    assert ffn.weights.up.grad is not None
    assert all(part is None or part.grad is None for part in (x, ffn.weights.down, ffn.weights.gate))


def test_inference_runs_a_backend_and_not_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    spies = [
        one._replace(run=lambda *given, run=one.run: called.append(1) or run(*given))
        for one in dispatch.BACKENDS
        if one is not REFERENCE
    ]
    monkeypatch.setattr(dispatch, "BACKENDS", [*spies, REFERENCE])
    ffn, x = BlockedFFN(random_network(5, 9), CUTS["uneven"]), torch.randn(2, 5, dtype=torch.float64)
    with torch.no_grad():
        compiled_ffn(ffn, x, Prefix(torch.tensor([3, 1])), "silu")
    assert called


def test_a_copy_of_the_code_has_an_operator_of_its_own() -> None:
    """As exported models have one each: two may be loaded in one process."""
    import importlib.util

    assert op.__file__ is not None
    spec = importlib.util.spec_from_file_location("copied_op", op.__file__)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    copy.register_activation("silu", silu)
    ffn, x = BlockedFFN(random_network(5, 9), CUTS["uneven"]), torch.randn(2, 5, dtype=torch.float64)
    choice = Prefix(torch.tensor([3, 1]))
    torch.testing.assert_close(copy.compiled_ffn(ffn, x, choice, "silu"), blocked_ffn(ffn, x, choice), **EXACT)


@pytest.mark.parametrize("kind", [Prefix, Subset, Soft])
@pytest.mark.parametrize("gradients", [False, True])
def test_autocast_leaves_the_type_that_compiled_code_expects(kind: type[Choice], gradients: bool) -> None:
    ffn = BlockedFFN(random_network(64, 90, dtype=torch.float32), Partition.equal(90, 8))
    x, choice = torch.randn(6, 64, requires_grad=gradients), random_choice(kind, 6, 12)
    with torch.autocast("cpu", torch.bfloat16):
        found = compiled_ffn(ffn, x, choice, "silu")
    expected = blocked_ffn(ffn, x, choice)
    assert found.dtype == x.dtype
    assert float((found - expected).norm() / expected.norm()) < 2e-2
    if gradients:
        found.sum().backward()
        gradient = torch.autograd.grad(expected.sum(), x)[0]
        assert x.grad is not None
        assert float((x.grad - gradient).norm() / gradient.norm()) < 2e-2
