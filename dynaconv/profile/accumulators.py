"""Sums over tokens that can be gathered in parts: merging the parts gives what one pass gives.

Every accumulator is a few tensors that add up, among them the number of tokens, so that they can be saved, loaded and
merged across batches or processes by the same three lines.

Shapes: M tokens, D residual width, F neurons, N blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch

from dynaconv.ranks import Ranks

QUANTILES = (0.1, 0.5, 0.9)
BINS = 1024
LOWEST, HIGHEST = 1e-4, 1e2  # relative errors outside are counted at these ends
ROWS = 256  # tokens whose absolute values fit a cache: ten times faster than all at once


class Sums:
    """Named tensors that add up. Subclasses say what is added.

    Attributes:
        sums: The tensors by name; ``tokens`` is always one of them.
    """

    def __init__(self, **sums: torch.Tensor) -> None:
        self.sums = {"tokens": torch.zeros((), dtype=torch.int64), **sums}

    @property
    def tokens(self) -> int:
        """Tokens gathered so far."""
        return int(self.sums["tokens"])

    def merge(self, other: Self) -> Self:
        """Adds what ``other`` gathered.

        Raises:
            ValueError: ``other`` is of another kind or size.
        """
        shapes = [{name: tensor.shape for name, tensor in each.sums.items()} for each in (self, other)]
        if type(self) is not type(other) or shapes[0] != shapes[1]:
            raise ValueError(f"cannot merge {type(other).__name__} {shapes[1]} into {type(self).__name__} {shapes[0]}")
        for name, tensor in self.sums.items():
            tensor += other.sums[name].to(tensor.device)
        return self

    def gather(self, ranks: Ranks) -> Self:
        """Merges what every rank gathered; all ranks then hold the same."""
        self.sums = {name: ranks.sum(tensor) for name, tensor in self.sums.items()}
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        """The sums, on the CPU, as they are saved."""
        return {name: tensor.cpu() for name, tensor in self.sums.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """The accumulator that :meth:`tensors` came from."""
        made = cls.__new__(cls)
        Sums.__init__(made, **{name: tensor.clone() for name, tensor in tensors.items()})
        return made


class ActivationMean(Sums):
    """Mean |activation| of every neuron."""

    def __init__(self, neurons: int, device: torch.device | str = "cpu") -> None:
        super().__init__(total=torch.zeros(neurons, dtype=torch.float64, device=device))

    def add(self, hidden: torch.Tensor) -> None:
        """Gathers ``(M, F)`` activations, what goes into the down projection."""
        self.sums["tokens"] += hidden.shape[0]
        for rows in torch.split(hidden, ROWS):
            self.sums["total"] += rows.abs().sum(0, dtype=torch.float32)

    def mean(self) -> torch.Tensor:
        """``(F,)`` float32, zeros when nothing was gathered."""
        return (self.sums["total"] / max(1, self.tokens)).float()


class CurveStatistics(Sums):
    """Mean and quantiles of difficulty curves, which are read from a histogram: the relative error is at most 0.7 %.

    Args:
        widths: W, at how many widths curves are measured, the empty and the full one among them.
        device: Where to gather.
    """

    def __init__(self, widths: int, device: torch.device | str = "cpu") -> None:
        inner = widths - 2  # at the ends errors are 1 and 0 for every token
        super().__init__(
            total=torch.zeros(inner, dtype=torch.float64, device=device),
            histogram=torch.zeros((inner, BINS), dtype=torch.int64, device=device),
        )

    def add(self, errors: torch.Tensor) -> None:
        """Gathers ``(M, W)`` relative errors."""
        inner = errors[:, 1:-1].float()
        self.sums["tokens"] += inner.shape[0]
        self.sums["total"] += inner.sum(0, dtype=torch.float64)
        position = (inner.clamp(LOWEST, HIGHEST) / LOWEST).log() * (BINS / math.log(HIGHEST / LOWEST))
        bins = position.long().clamp_(max=BINS - 1) + BINS * torch.arange(inner.shape[1], device=inner.device)
        histogram = self.sums["histogram"]
        histogram += torch.bincount(bins.flatten(), minlength=histogram.numel()).view_as(histogram)

    def mean(self) -> torch.Tensor:
        """``(W,)`` float32, mean r_n; 1 at width 0 and 0 at width N."""
        return _with_ends((self.sums["total"] / max(1, self.tokens)).float())

    def quantiles(self) -> torch.Tensor:
        """``(3, W)`` float32, the .1, .5 and .9 quantiles of r_n."""
        below = self.sums["histogram"].cumsum(1)
        rows = []
        for share in QUANTILES:
            rank = torch.full((below.shape[0], 1), max(1, math.ceil(share * self.tokens)), device=below.device)
            middle = torch.searchsorted(below, rank)[:, 0].clamp_(max=BINS - 1) + 0.5
            rows.append(_with_ends(LOWEST * (HIGHEST / LOWEST) ** (middle / BINS)))
        return torch.stack(rows)


class RidgeStatistics(Sums):
    """What ridge regression of the log curve on the FFN's input needs: the two second moments of [x; 1]."""

    def __init__(self, width: int, blocks: int, device: torch.device | str = "cpu") -> None:
        super().__init__(
            gram=torch.zeros((width + 1, width + 1), device=device),
            target=torch.zeros((width + 1, blocks), device=device),
        )

    def add(self, x: torch.Tensor, targets: torch.Tensor) -> None:
        """Gathers ``(M, D)`` FFN inputs and their ``(M, N)`` log errors."""
        features = torch.nn.functional.pad(x.float(), (0, 1), value=1.0)
        self.sums["tokens"] += x.shape[0]
        self.sums["gram"].addmm_(features.T, features)
        self.sums["target"].addmm_(features.T, targets.float())


class SecondMoment(Sums):
    """Sum over tokens of x x^T, for least squares on x."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        super().__init__(gram=torch.zeros((width, width), device=device))

    def add(self, x: torch.Tensor) -> None:
        """Gathers ``(M, W)`` vectors."""
        self.sums["tokens"] += x.shape[0]
        self.sums["gram"].addmm_(x.T.float(), x.float())


class Influence(Sums):
    """How much a decoder layer changes the residual stream that passes it, in two measures."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        zeros = torch.zeros((), dtype=torch.float64, device=device)
        super().__init__(cosine=zeros, share=zeros.clone())

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Gathers the residual stream ``(M, D)`` before and behind the layer."""
        self.sums["tokens"] += before.shape[0]
        for x, y in zip(torch.split(before, ROWS), torch.split(after, ROWS), strict=True):
            x, y = x.float(), y.float()
            self.sums["cosine"] += torch.cosine_similarity(x, y, dim=-1).sum(dtype=torch.float64)
            share = (y - x).norm(dim=-1) / y.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
            self.sums["share"] += share.sum(dtype=torch.float64)

    def block_influence(self) -> torch.Tensor:
        """Scalar float32: 1 - mean cosine(x, x + f(x)). ShortGPT, arXiv 2403.03853."""
        return (1 - self.sums["cosine"] / max(1, self.tokens)).float()

    def contribution(self) -> torch.Tensor:
        """Scalar float32: mean ||f(x)|| / ||x + f(x)||. Weight subcloning, arXiv 2312.09299."""
        return (self.sums["share"] / max(1, self.tokens)).float()


def _with_ends(inner: torch.Tensor) -> torch.Tensor:
    """``(W - 2,)`` errors with the 1 of width 0 before and the 0 of width N behind."""
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0), value=1.0), (0, 1), value=0.0)
