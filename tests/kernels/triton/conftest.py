"""Random networks with few-bit copies, and what the reference makes of them.

Files in ``interpreted/`` run where ``TRITON_INTERPRET=1`` is set before triton is imported; ``test_interpreted.py``
runs them so in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from dynaconv.dynamic.few_bits import FewBitCopy
from dynaconv.dynamic.layout import CopyLayout, RouterLayout
from dynaconv.dynamic.routers.sketch import SketchRouter
from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Subset
from dynaconv.kernels.partition import Partition
from dynaconv.kernels.reference import blocked_ffn
from dynaconv.kernels.sketched import Asked, Computed, SketchedFFN
from dynaconv.kernels.weights import FFNWeights

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
collect_ignore = [] if INTERPRETED else ["interpreted"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
}


@dataclass
class Sketch:
    """A random network, its sketch, and the router that the sketch stands for, which computes in float32."""

    ffn: SketchedFFN
    router: SketchRouter
    copy: FewBitCopy
    weights: FFNWeights  # in float32

    def level(self, x: Tensor, share: float, exact_share: float | None = None) -> Asked:
        """Levels at which tokens (M, D) use about that share of the neurons, with no score near them."""
        compared, looked = self.router.parts(self.router(x.float()))
        scores = torch.cat([compared, looked], dim=-1)
        thresholds = torch.stack([_gap(row, both, share) for row, both in zip(compared, scores, strict=True)])
        exact = None
        if exact_share is not None:
            exact = torch.stack([_gap(row, row, exact_share) for row in compared]).exp()
        return Asked(thresholds.exp(), exact)

    def expected(self, x: Tensor, asked: Asked) -> Computed:
        """What the router and the reference give together, in float32."""
        compared, looked = self.router.parts(self.router(x.float()))
        level = asked.level.log()[:, None]
        on = compared > level
        exact = None if asked.exact_level is None else on & (compared > asked.exact_level.log()[:, None])
        closer = looked > level
        low = self.copy.low(self.weights) if exact is not None else None
        mean = None if asked.mean is None else asked.mean.float()
        ffn = BlockedFFN(self.weights, Partition.equal(on.shape[1], 1), low, mean)
        output = blocked_ffn(ffn, x.float(), Subset(on, exact, closer))
        counts = torch.stack([closer.sum(1), on.sum(1), (on if exact is None else exact).sum(1)], dim=1)
        return Computed(output, counts.int())


def _gap(row: Tensor, both: Tensor, share: float) -> Tensor:
    """A threshold that about ``share`` of ``row`` passes, in the middle of a gap between scores of ``both``."""
    if share >= 1:
        return both.min() - 1
    if share <= 0:
        return both.max() + 1
    wanted, ordered = row.quantile(1 - share), both.sort().values
    near = (ordered - wanted).abs().argsort()[:5].sort().values
    candidates = ordered[near[0] : near[-1] + 1]
    widest = candidates.diff().argmax()
    assert candidates.diff()[widest] > 1e-4, "scores lie too close for float32 to tell them apart"
    return (candidates[widest] + candidates[widest + 1]) / 2


def random_weights(
    columns: int,
    neurons: int,
    activation: Callable[[Tensor], Tensor],
    dtype: torch.dtype = torch.float32,
    *,
    gated: bool = True,
    biased: bool = False,
    seed: int = 0,
) -> FFNWeights:
    """Weights whose outputs are about as large as their inputs."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    return FFNWeights(
        gate=values(neurons, columns) if gated else None,
        up=values(neurons, columns),
        down=values(columns, neurons),
        activation=activation,
        gate_bias=values(neurons) if gated and biased else None,
        up_bias=values(neurons) if biased else None,
        down_bias=values(columns) if biased else None,
    )


def random_sketch(
    columns: int = 63,
    neurons: int = 77,
    activation: str = "silu",
    dtype: torch.dtype = torch.float32,
    *,
    gated: bool = True,
    biased: bool = False,
    planes: tuple[int, int, int] = (2, 3, 4),
    group: int = 32,
) -> Sketch:
    """A network with a copy of ``planes[2]`` planes, of which the looks read the first ``planes[0]``, ``planes[1]``."""
    weights = random_weights(columns, neurons, ACTIVATIONS[activation], dtype, gated=gated, biased=biased)
    exact = FFNWeights(*(one.float() if isinstance(one, Tensor) else one for one in weights))
    coarse, bits, all_planes = planes
    copy = FewBitCopy(CopyLayout(all_planes, group), bits, coarse)
    copy.follow(exact)
    router = SketchRouter(columns, Partition.equal(neurons, 1), RouterLayout("sketch", reach=0.7))
    router.up_mean.copy_(0.1 + torch.rand(neurons, generator=torch.Generator().manual_seed(1)) / 10)
    router.follow(copy, exact)
    gate, up, down = copy._encoded(exact)
    looked = copy.norms * router.up_mean if gated else copy.norms
    ffn = SketchedFFN(weights, gate, up, down, copy.norms, looked, router.reach, coarse, bits, activation)
    return Sketch(ffn, router, copy, exact)


def tokens(count: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
    """Inputs (count, columns) of about unit variance."""
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def networks() -> type:
    """The functions of this file, for tests in any folder below."""

    class Networks:
        sketch = staticmethod(random_sketch)
        weights = staticmethod(random_weights)
        tokens = staticmethod(tokens)
        activations = ACTIVATIONS

    return Networks
