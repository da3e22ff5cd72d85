"""What a router is: scores from the FFN's input, and blocks from scores and a threshold.

A router kind is one file beside this one and one line in ``kinds.py``. All kinds keep one rule, so that one dial drives
them all: a lower threshold never takes a block away from a token with the same scores.

D residual width, N blocks, L sites. Scores are (...) where ``features`` is 0 and (..., n) where it is 1.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynaconv.dynamic.layout import RouterLayout
from dynaconv.kernels.choice import Choice, Prefix, Subset
from dynaconv.kernels.partition import Partition


class Router(nn.Module):
    """Base of all kinds: a linear branch, a Linear-SiLU-Linear branch, or the sum of both; then what subclasses add.

    Args:
        hidden_size: D.
        partition: The FFN's blocks.
        layout: Which branches there are, and the bound of scores.

    Attributes:
        kind: Its name in ``dynaconv.json``.
        experts: ``nested`` where tokens use the first blocks, ``routed`` where they choose them one by one, ``neurons``
            where blocks are single neurons.
        features: Dimensions that scores have beyond those of the tokens, 0 or 1.
        objective: What trains it: ``dial`` (the losses at the sampled dial, through :meth:`margins`), the name of a
            training objective of its own, ``weights`` (it follows the weights of the FFN), or ``none``.
        closed_form: Whether carve solves it without training.
        default_bound: Largest score where a recipe names none.
        exportable: Why an engine without this code cannot run it; empty where one can.
    """

    kind: ClassVar[str]
    experts: ClassVar[str] = "nested"
    features: ClassVar[int] = 1
    objective: ClassVar[str] = "none"
    closed_form: ClassVar[bool] = False
    default_bound: ClassVar[float] = 2.0
    exportable: ClassVar[str] = "no other engine leaves out a different number of neurons for each token"

    def __init__(self, hidden_size: int, partition: Partition, layout: RouterLayout) -> None:
        super().__init__()
        self.partition, self.bound = partition, layout.bound
        outputs = self.outputs()
        self.linear = nn.Linear(hidden_size, outputs) if layout.linear else None
        self.hidden = nn.Linear(hidden_size, layout.rank) if layout.rank else None
        self.output = nn.Linear(layout.rank, outputs) if layout.rank else None
        for last in (self.linear, self.output):  # routers start silent: every token alike
            if last is not None:
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)

    @property
    def blocks(self) -> int:
        """N."""
        return self.partition.blocks

    def outputs(self) -> int:
        """Scores of one token."""
        return self.blocks

    def forward(self, x: Tensor) -> Tensor:
        """Scores of tokens ``x`` (..., D), float32, computed in the parameters' own precision."""
        with torch.autocast(x.device.type, enabled=False):
            return self.bounded(self.raw(x).float())

    def raw(self, x: Tensor) -> Tensor:
        """The sum of the branches, (..., n)."""
        first = self.hidden if self.hidden is not None else self.linear
        if first is None:
            return x.new_zeros((*x.shape[:-1], self.outputs()))
        x = x.to(first.weight.dtype)
        raw: Tensor | None = None
        if self.hidden is not None and self.output is not None:
            raw = self.output(functional.silu(self.hidden(x)))
        if self.linear is None:
            assert raw is not None
            return raw
        return self.linear(x) if raw is None else self.linear(x) + raw

    def bounded(self, raw: Tensor) -> Tensor:
        """Scores (as :meth:`forward` gives them) from the float32 sum of the branches (..., n)."""
        return raw

    def soft_cap(self, raw: Tensor) -> Tensor:
        """``raw`` pressed between -bound and bound, its order kept."""
        return self.bound * torch.tanh(raw / self.bound)

    def choose(self, scores: Tensor, threshold: Tensor | float) -> Choice:
        """What tokens of these ``scores`` use at ``threshold`` (a number, or broadcastable to (...))."""
        raise NotImplementedError

    def threshold_range(self) -> tuple[float, float]:
        """A threshold at which all blocks are on, and one at which (nearly) none is."""
        raise NotImplementedError

    def margins(self, scores: Tensor, threshold: Tensor | float) -> Tensor:
        """How far each block is from being turned off, (..., N), in the unit of scores; a block is on above 0.

        Of kinds that are trained end to end.
        """
        raise NotImplementedError

    def top(self, x: Tensor, width: int) -> Choice:
        """``width`` blocks for every token of ``x`` (..., D): the first, or of routed blocks the top-k."""
        return Prefix(torch.full(x.shape[:-1], width, dtype=torch.int64, device=x.device))

    @property
    def flops_per_token(self) -> int:
        """FLOPs of one token's scores: two a weight."""
        return 2 * sum(parameter.numel() for parameter in self.parameters())

    @property
    def bytes_per_token(self) -> int:
        """Bytes of parameters read for one token's scores."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())


def as_threshold(threshold: Tensor | float, scores: Tensor) -> Tensor:
    """``threshold`` as a tensor like ``scores``."""
    return torch.as_tensor(threshold, dtype=scores.dtype, device=scores.device)


def nearest_width(scores: Tensor, threshold: Tensor | float, blocks: int) -> Prefix:
    """The whole width nearest to score - threshold, 0 to ``blocks``, for each token of ``scores`` (...)."""
    return Prefix((scores - as_threshold(threshold, scores) - 0.5).ceil().clamp(0, blocks).long())


def top_mask(scores: Tensor, width: int) -> Subset:
    """The ``width`` blocks of the highest scores (..., N) of each token; ties go to the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :width]
    return Subset(torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True))
