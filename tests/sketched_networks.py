"""Random sketched FFNs, and what the router and the reference make of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dynaconv.dynamic.few_bits import FewBitCopy
from dynaconv.dynamic.layout import CopyLayout, RouterLayout
from dynaconv.dynamic.routers.sketch import SketchRouter
from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Subset
from dynaconv.kernels.partition import Partition
from dynaconv.kernels.reference import blocked_ffn
from dynaconv.kernels.sketched import Asked, Computed, SketchedFFN
from dynaconv.kernels.weights import FFNWeights

ACTIVATIONS = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_pytorch_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
}


@dataclass
class Case:
    """An FFN with its router; everything is computed in float32, from weights of ``dtype``."""

    residual: int
    neurons: int
    gated: bool = True
    biases: bool = False
    activation: str = "silu"
    dtype: torch.dtype = torch.float32
    layout: CopyLayout = field(default_factory=CopyLayout)
    coarse: int = 2
    bits: int = 3
    means: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        D, F = self.residual, self.neurons
        gate = self.draw(F, D) / D**0.5 if self.gated else None
        biases = (self.draw(F), self.draw(F), self.draw(D)) if self.biases else (None, None, None)
        gate_bias = biases[0] if self.gated else None
        act = ACTIVATIONS[self.activation]
        self.weights = FFNWeights(
            gate, self.draw(F, D) / D**0.5, self.draw(D, F) / F**0.5, act, gate_bias, biases[1], biases[2]
        )
        self.exact = FFNWeights(*(one.float() if isinstance(one, Tensor) else one for one in self.weights))
        self.copy = FewBitCopy(self.layout, self.bits, self.coarse)
        self.copy.follow(self.exact)
        self.router = SketchRouter(D, Partition.equal(F, 1), RouterLayout("sketch", reach=0.5))
        self.router.up_mean.copy_(0.5 + torch.rand(F, generator=self.generator))
        self.router.offset.fill_(0.3)
        self.router.follow(self.copy, self.exact)
        self.mean = self.draw(F).float() / 4 if self.means else None

    def draw(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def sketched(self) -> SketchedFFN:
        """What a kernel is given."""
        return self.router.sketched(self.weights, self.activation)

    def thresholds(self, x: Tensor, share: float, exact_share: float, near: int = 20) -> tuple[Tensor, Tensor]:
        """Two thresholds for each token of ``x``, in wide gaps between scores, so that rounding changes no choice.

        Gaps are looked for among the ``near`` scores to either side of where the share would be.
        """
        compared, looked = self.router.parts(self.router(x.float()))
        found = []
        for wanted in (share, exact_share):
            each = []
            for token in range(len(x)):
                known = torch.cat([compared[token], looked[token]]).sort().values
                place = min(len(known) - 2, max(0, round((1 - wanted) * (len(known) - 1))))
                around = range(max(0, place - near), min(len(known) - 1, place + near))
                best = max(around, key=lambda i: float(known[i + 1] - known[i]))
                each.append(float(known[best] + known[best + 1]) / 2)
            found.append(torch.tensor(each))
        return found[0], torch.maximum(*found)

    def asked(self, threshold: Tensor, exact: Tensor) -> Asked:
        """The same as sizes."""
        base = None if self.mean is None else self.mean @ self.exact.down.t()
        exact_level = self.router.level(exact) if self.layout.values else None
        return Asked(self.router.level(threshold), exact_level, self.mean, base)

    def expected(self, x: Tensor, threshold: Tensor, exact: Tensor) -> Computed:
        """What the router and the reference give."""
        x, partition = x.float(), self.router.partition
        scores = self.router(x)
        choice = self.router.choose(scores, threshold)
        assert isinstance(choice, Subset) and choice.closer is not None
        low = self.copy.low(self.exact) if self.layout.values else None
        some = choice.on if low is None else self.router.choose(scores, exact).mask(self.neurons)
        chosen = Subset(choice.on, some if low is not None else None)
        with torch.no_grad():
            output = blocked_ffn(BlockedFFN(self.exact, partition, low, self.mean), x, chosen)
        counts = torch.stack([choice.closer.sum(1), choice.on.sum(1), some.sum(1)], dim=1)
        return Computed(output, counts.int())
