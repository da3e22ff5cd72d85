"""Training-free baselines at the same work: quantised weights, activation sparsity, coarse experts, and the oracle.

Each is one class: a paper, what of it is implemented, what is left out, and what a token costs. Costs are shares of the
parent's FFN in bf16 with everything counted that is read for a token: scales and minimums in fp16, routers. Positions
of what is read (indices) and turning codes into numbers are not counted. All are applied to the FFNs alone, and none
trains anything. Those that read every weight in fewer bits are in ``quality_quantised.py``; those that leave weights
out take such codes in place of the bf16 weights, since both save bytes.

D residual width, F FFN width, M calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from quality_ffn import FFN, Method, Network, Shares
from quality_quantised import GPTQ, GROUP, HQQ, Asymmetric, Exact, Quantised, Symmetric
from torch import Tensor
from torch.nn.functional import linear, normalize, one_hot

from dynaconv.errors import ConfigError
from dynaconv.profile.clusters import balanced_clusters

Codes = Exact | Quantised
EXACT = Exact()


@dataclass(frozen=True)
class TEAL:
    """TEAL (arXiv 2408.14690): of each matrix's input, only what is large is multiplied, and only its columns are read.

    Thresholds are quantiles of the inputs' magnitudes in the dense model on calibration text. Here all matrices get
    the same sparsity; the paper's greedy search for one a matrix is left out, as is leaving the first half of a prompt
    dense. Gate and up have the same input and so the same threshold.

    Attributes:
        sparsity: Share of the inputs that is left out, in [0, 1).
        codes: What weights are kept as.
    """

    sparsity: float
    codes: Codes = EXACT

    @property
    def name(self) -> str:
        """With the codes."""
        return f"TEAL{self.codes.suffix}"

    @property
    def setting(self) -> str:
        """The sparsity."""
        return f"{self.sparsity:g} of inputs off"

    @property
    def share(self) -> float:
        """Of all columns."""
        return 1 - self.sparsity

    def fit(self, ffn: FFN, inputs: Tensor) -> Network:
        """Thresholds for the FFN's input and for its hidden activations."""
        read, ffn = self.codes.columns_read, self.codes.rounded_ffn(ffn, inputs)
        outer = magnitude_quantile(inputs, self.sparsity)
        inner = magnitude_quantile(ffn.hidden(inputs), self.sparsity)

        def run(x: Tensor) -> tuple[Tensor, Shares]:
            seen = x.abs() >= outer
            hidden = ffn.hidden(x * seen)
            active = hidden.abs() >= inner
            flops = (2 * _share(seen) + _share(active)) / 3
            shares = Shares((2 * read(seen) + read(active)) / 3, flops, _share(active))
            return linear(hidden * active, ffn.down), shares

        return run


@dataclass(frozen=True)
class CATS:
    """CATS (arXiv 2404.08763): the gate is computed in full; up and down only for neurons whose gate is large.

    One threshold a layer on |activation(gate)|: its quantile on calibration text. The paper's kernel and its
    fine-tuning are left out.

    Attributes:
        kept: Share of the neurons that is kept on the calibration text, in (0, 1].
        codes: What weights are kept as.
    """

    kept: float
    codes: Codes = EXACT

    @property
    def name(self) -> str:
        """With the codes."""
        return f"CATS{self.codes.suffix}"

    @property
    def setting(self) -> str:
        """The share kept."""
        return f"{self.kept:g} of neurons"

    @property
    def share(self) -> float:
        """A third for the gate, the rest for neurons that are kept."""
        return (1 + 2 * self.kept) / 3

    def fit(self, ffn: FFN, inputs: Tensor) -> Network:
        """The threshold."""
        codes, ffn = self.codes, self.codes.rounded_ffn(ffn, inputs)
        threshold = magnitude_quantile(ffn.activation(linear(inputs, ffn.gate)), 1 - self.kept)
        row = codes.columns_read(torch.ones(len(ffn.down), dtype=torch.bool))

        def run(x: Tensor) -> tuple[Tensor, Shares]:
            gate = ffn.activation(linear(x, ffn.gate))
            on = gate.abs() >= threshold
            active = _share(on)
            read = (row + active * row + codes.columns_read(on)) / 3
            return linear(gate * on * linear(x, ffn.up), ffn.down), Shares(read, (1 + 2 * active) / 3, active)

        return run


@dataclass(frozen=True)
class CoarseExperts:
    """After CMoE (arXiv 2502.04416), training-free: 16 experts, 2 of them shared, of the others each token's best.

    Inputs and rows of gate and up are normalised, each calibration token marks its 10 largest neurons, and those that
    are marked most often are shared. The rest are clustered by their marks, in experts of one size; of each expert the
    neuron nearest to the centre is the router: |activation(x gate) * x up|. Clusters are found by
    :mod:`dynaconv.profile.clusters` rather than by the paper's exact assignment; its scaling of experts starts at 1,
    and its training and load balancing are left out.

    Attributes:
        active: Experts a token uses, the shared ones among them: from 2 to 16.
    """

    active: int
    name = "coarse experts"
    experts = 16
    shared = 2
    marks = 10

    @property
    def setting(self) -> str:
        """The experts."""
        return f"{self.active} of {self.experts}"

    @property
    def share(self) -> float:
        """Of the neurons."""
        return self.active / self.experts

    def fit(self, ffn: FFN, inputs: Tensor) -> Network:
        """Experts and their routers.

        Raises:
            ConfigError: F is not a multiple of 16.
        """
        neurons, routed = len(ffn.gate), self.experts - self.shared
        if neurons % self.experts:
            raise ConfigError("coarse experts need an FFN width that 16 divides", found=f"{neurons} neurons")
        always, expert, routers = self._grouped(ffn, inputs)
        member = one_hot(expert, routed).t().float() * ~always  # (experts, F)
        router = FFN(ffn.gate[routers], ffn.up[routers], ffn.down[:, routers], ffn.activation)
        chosen, size = self.active - self.shared, 3 * neurons

        def run(x: Tensor) -> tuple[Tensor, Shares]:
            best = router.hidden(x).abs().topk(chosen, -1).indices
            weights = torch.zeros(*x.shape[:-1], routed).scatter_(-1, best, 1.0)
            hidden = ffn.hidden(x) * (always + weights @ member)
            used = self.share + (2 * routed / size if chosen < routed else 0.0)  # router: gate and up of one neuron
            return linear(hidden, ffn.down), Shares(used, used, self.share)

        return run

    def _grouped(self, ffn: FFN, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shared neurons, (F,) bool; each neuron's expert, (F,) int64; each expert's router neuron."""
        neurons, routed = len(ffn.gate), self.experts - self.shared
        plain = FFN(normalize(ffn.gate), normalize(ffn.up), ffn.down, ffn.activation)
        hidden = plain.hidden(normalize(inputs)).abs()
        marked = torch.zeros_like(hidden).scatter_(1, hidden.topk(self.marks, 1).indices, 1.0).t()  # (F, M)
        size = neurons // self.experts
        always = torch.zeros(neurons, dtype=torch.bool)
        always[marked.sum(1).argsort(descending=True, stable=True)[: self.shared * size]] = True
        rest = (~always).nonzero()[:, 0]
        found = balanced_clusters(marked[rest], [size] * routed)
        expert = torch.zeros(neurons, dtype=torch.int64).index_copy_(0, rest, found)
        routers = []
        for group in range(routed):
            own = rest[found == group]
            distance = (marked[own] - marked[own].mean(0)).square().sum(1)
            routers.append(own[distance.argmin()])
        return always, expert, torch.stack(routers)


@dataclass(frozen=True)
class Oracle:
    """What a perfect choice of neurons would give: the largest |activation| * norm of the down column. Reference only.

    Finding out costs as much as the whole FFN, and is not counted.

    Attributes:
        kept: Share of the neurons of each token.
        codes: What weights are kept as.
    """

    kept: float
    codes: Codes = EXACT

    @property
    def name(self) -> str:
        """With the codes."""
        return f"oracle (choice not counted){self.codes.suffix}"

    @property
    def setting(self) -> str:
        """The share kept."""
        return f"{self.kept:g} of neurons"

    @property
    def share(self) -> float:
        """Of the neurons."""
        return self.kept

    def fit(self, ffn: FFN, inputs: Tensor) -> Network:
        """``inputs`` are not looked at, but by the codes."""
        codes, ffn = self.codes, self.codes.rounded_ffn(ffn, inputs)
        norms, count = ffn.down.norm(dim=0), round(self.kept * len(ffn.gate))
        row, active = codes.columns_read(torch.ones(len(ffn.down), dtype=torch.bool)), count / len(ffn.gate)

        def run(x: Tensor) -> tuple[Tensor, Shares]:
            hidden = ffn.hidden(x)
            best = (hidden.abs() * norms).topk(count, -1).indices
            on = torch.zeros_like(hidden, dtype=torch.bool).scatter_(-1, best, True)
            read = (2 * active * row + codes.columns_read(on)) / 3
            return linear(hidden * on, ffn.down), Shares(read, active, active)

        return run


def peers(say: Callable[[str], None]) -> list[Method]:
    """All baselines at all settings, but for those whose library is missing: ``say`` is told."""
    if HQQ.missing():
        say("rows of HQQ are left out: the hqq package is not installed (pip install hqq)")
    return [method for method in METHODS if not (isinstance(method, HQQ) and HQQ.missing())]


METHODS: list[Method] = [
    *(kind(bits) for kind in (Symmetric, Asymmetric) for bits in (8, 4, 3, 2)),
    *(kind(bits, group) for kind in (GPTQ, HQQ) for group in (GROUP, 2 * GROUP) for bits in (4, 3, 2)),
    *(TEAL(sparsity) for sparsity in (0.25, 0.4, 0.5, 0.625, 0.75)),
    *(TEAL(sparsity, Asymmetric(4)) for sparsity in (0.25, 0.4, 0.5, 0.625, 0.75)),
    *(CATS(kept) for kept in (0.7, 0.5, 0.3, 0.2, 0.1)),
    *(CATS(kept, Asymmetric(4)) for kept in (0.7, 0.5, 0.3, 0.1)),
    *(CoarseExperts(active) for active in (14, 12, 8, 6, 4)),
    *(Oracle(kept) for kept in (0.5, 0.375, 0.25, 0.125, 0.0625)),
    *(Oracle(kept, Asymmetric(4)) for kept in (0.5, 0.25, 0.125, 0.0625)),
]
BASELINES = list(dict.fromkeys(method.name for method in METHODS))


def magnitude_quantile(values: Tensor, share: float) -> Tensor:
    """The magnitude that the share ``1 - share`` of ``values`` reaches; 0 where all shall."""
    below = round(share * values.numel())
    if below == 0:
        return values.new_zeros(())
    return values.abs().flatten().kthvalue(min(below + 1, values.numel())).values


def _share(on: Tensor) -> float:
    return float(on.float().mean())
