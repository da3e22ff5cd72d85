"""The GPU backend of sketch routers, run by Triton's interpreter, against router and reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dynaconv.kernels.sketched import Asked
from dynaconv.kernels.triton_sketched import can_run, run

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def agree(sketch: Any, x: torch.Tensor, asked: Asked) -> None:
    """Same counts, and outputs equal but for rounding of the result's dtype."""
    able, reason = can_run(sketch.ffn, x)
    assert able, reason
    found, expected = run(sketch.ffn, x, asked), sketch.expected(x, asked)
    assert found.output.dtype == x.dtype
    assert found.counts.tolist() == expected.counts.tolist()
    error = (found.output.float() - expected.output).norm() / expected.output.norm().clamp_min(1e-6)
    assert error <= DTYPES[x.dtype]


@pytest.mark.parametrize(("share", "count", "neurons"), [(0.0, 3, 21), (0.3, 1, 77), (1.0, 2, 9)])
def test_none_some_and_all_neurons(networks: Any, share: float, count: int, neurons: int) -> None:
    sketch = networks.sketch(63, neurons)
    x = networks.tokens(count, 63)
    asked = sketch.level(x, share)
    agree(sketch, x, asked)
    assert sketch.expected(x, asked).counts[:, 1].float().mean() / neurons == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("gated", [True, False])
def test_activations_biases_low_bits_and_means(networks: Any, activation: str, gated: bool) -> None:
    sketch = networks.sketch(47, 20, activation, gated=gated, biased=activation != "silu")
    x = networks.tokens(2, 47)
    asked = sketch.level(x, 0.35, 0.05)
    counts = sketch.expected(x, asked).counts
    assert (counts[:, 1] > counts[:, 2]).all() and (counts[:, 2] > 0).all(), "some neurons are exact, and some not"
    agree(sketch, x, asked)
    agree(sketch, x, replace(asked, mean=networks.tokens(1, 20, seed=9)[0] / 10))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(networks: Any, dtype: torch.dtype) -> None:
    sketch = networks.sketch(47, 18, "silu", dtype)
    x = networks.tokens(2, 47, dtype)
    agree(sketch, x, replace(sketch.level(x, 0.5, 0.2), mean=networks.tokens(2, 18, dtype, seed=9) / 10))


@pytest.mark.parametrize("planes", [(1, 1, 1), (2, 2, 4), (1, 4, 4), (3, 3, 8), (2, 5, 6)])
def test_numbers_of_planes(networks: Any, planes: tuple[int, int, int]) -> None:
    sketch = networks.sketch(40, 9, planes=planes)
    x = networks.tokens(1, 40)
    agree(sketch, x, sketch.level(x, 0.6, 0.3))


def test_columns_of_several_steps(networks: Any) -> None:
    """Longer than a program reads at once, of codes (4096 columns) and of weights (256)."""
    sketch = networks.sketch(4160, 5, group=64)
    x = networks.tokens(1, 4160)
    agree(sketch, x, sketch.level(x, 0.6, 0.3))


def test_tokens_have_levels_of_their_own_and_do_not_see_their_batch(networks: Any) -> None:
    """Dials of 0 to 1 in a batch; every row has the same bits alone, and in batches of other sizes."""
    sketch = networks.sketch(63, 13)
    x = networks.tokens(6, 63)
    rows = [sketch.level(x[m : m + 1], share, 0.2 * share) for m, share in enumerate((0.0, 0.2, 0.4, 0.6, 0.8, 1.0))]
    asked = Asked(torch.cat([row.level for row in rows]), torch.cat([row.exact_level for row in rows]))
    agree(sketch, x, asked)
    together = run(sketch.ffn, x, asked)
    for first, stop in ((1, 2), (2, 5)):
        own = Asked(asked.level[first:stop], asked.exact_level[first:stop])
        part = run(sketch.ffn, x[first:stop], own)
        assert torch.equal(part.output, together.output[first:stop])
        assert torch.equal(part.counts, together.counts[first:stop])


def test_an_infinite_weight_of_a_neuron_that_is_off_does_no_harm(networks: Any) -> None:
    sketch = networks.sketch(40, 12)
    x = networks.tokens(2, 40)
    asked = sketch.level(x, 0.5)
    alone = run(sketch.ffn, x[:1], Asked(asked.level[:1])).output
    compared = sketch.router.parts(sketch.router(x))[0]
    off = (compared[0] < asked.level[0].log()) & (compared[1] > asked.level[1].log())
    assert off.any()
    sketch.ffn.weights.down[:, off] = torch.inf
    together = run(sketch.ffn, x, asked).output
    assert torch.equal(together[:1], alone)
    assert not together[1].isfinite().all()


def test_what_it_refuses(networks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sketch = networks.sketch(40, 12)
    x = networks.tokens(2, 40)
    assert "16 tokens" in can_run(sketch.ffn, networks.tokens(17, 40))[1]
    assert "activation" in can_run(replace(sketch.ffn, activation="snake"), x)[1]
    assert "multiples of 32" in can_run(networks.sketch(40, 12, group=8).ffn, x)[1]
    assert "gradients" in can_run(sketch.ffn, x.requires_grad_())[1]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert can_run(sketch.ffn, x) == (False, "tensors are not on a GPU")
