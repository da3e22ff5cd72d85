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


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
@pytest.mark.parametrize(("columns", "neurons"), [(63, 77), (160, 40)])
def test_exact_neurons(networks: Any, columns: int, neurons: int, share: float) -> None:
    sketch = networks.sketch(columns, neurons)
    x = networks.tokens(3, columns)
    agree(sketch, x, sketch.level(x, share))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("gated", [True, False])
def test_activations_and_dtypes(networks: Any, dtype: torch.dtype, activation: str, gated: bool) -> None:
    sketch = networks.sketch(47, 33, activation, dtype, gated=gated, biased=activation != "silu")
    x = networks.tokens(2, 47, dtype)
    asked = sketch.level(x, 0.4 if activation != "relu" else 0.2, 0.2 if activation != "relu" else 0.1)
    mean = networks.tokens(1, 33, seed=9)[0] / 10
    agree(sketch, x, replace(asked, mean=mean))
