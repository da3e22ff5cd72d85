"""Routers: which blocks a token wants, from the FFN's input.

All kinds share one module and one rule, "no block is lost as the level rises", so that one dial drives all. Routers of
nested experts give a width n, which means the first n blocks:

* ``gate``: one score s, bounded to +-S blocks; width = round(s + level). Trained end to end.
* ``curve``: N predictions of log t_n, the error that a width of n blocks would make; width = argmin t_n + exp(-level)
  * share_n. After D2DMoE (arXiv 2310.04361), with the argmin in place of its threshold.
* ``class``: N logits over the smallest sufficient width 1..N, after DynaMoE (arXiv 2502.12325); width = the smallest
  whose cumulative probability reaches the level.
* ``none``: no parameters and no opinion; width = round(level) for every token.

Routers of routed experts choose blocks one by one:

* ``blocks``: a score for each block, which is on if score + level > 0. Closed form: the logarithm of the norm of what
  the block adds (D2DMoE, arXiv 2310.04361); or trained end to end.

D residual width, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynaconv.dynamic.layout import RouterLayout


class Router(nn.Module):
    """A token's wish, from an FFN input of width D.

    Args:
        hidden_size: D.
        edges: N + 1 neuron positions of the blocks.
        layout: Kind, branches and bound.
    """

    def __init__(self, hidden_size: int, edges: Sequence[int], layout: RouterLayout) -> None:
        super().__init__()
        self.kind, self.bound, self.blocks = layout.kind, layout.bound, len(edges) - 1
        outputs = 1 if layout.kind == "gate" else self.blocks
        self.linear = nn.Linear(hidden_size, outputs) if layout.linear else None
        self.hidden = nn.Linear(hidden_size, layout.rank) if layout.rank else None
        self.output = nn.Linear(layout.rank, outputs) if layout.rank else None
        self.edges = tuple(edges)
        for start in (self.linear, self.output):  # routers start silent: every token alike
            if start is not None:
                nn.init.zeros_(start.weight)
                nn.init.zeros_(start.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of tokens ``x`` (..., D), computed in fp32.

        Returns:
            (...) for ``gate`` and ``none``, (..., N) otherwise.
        """
        with torch.autocast(x.device.type, enabled=False):
            return self._scores(x.float())

    def _scores(self, x: Tensor) -> Tensor:
        raw: Tensor | None = None
        if self.hidden is not None and self.output is not None:
            raw = self.output(functional.silu(self.hidden(x)))
        if self.linear is not None:
            raw = self.linear(x) if raw is None else raw + self.linear(x)
        if raw is None:
            return x.new_zeros(x.shape[:-1])
        if self.kind == "gate":
            raw = raw.squeeze(-1)
        return self.bound * torch.tanh(raw / self.bound) if self.kind in ("gate", "blocks") else raw

    @property
    def features(self) -> int:
        """Dimensions that scores have beyond those of the tokens, 0 or 1."""
        return int(self.kind not in ("gate", "none"))

    def choose(self, scores: Tensor, level: Tensor | float) -> Tensor:
        """What tokens of these ``scores`` use at ``level`` (a number, or broadcastable to (...)).

        Monotone: a higher level never takes a block away for the same scores.

        Returns:
            Widths (...) int64 in 0..N; for ``blocks`` which blocks, (..., N) bool.
        """
        return self.margins(scores, level) > 0 if self.kind == "blocks" else self.widths(scores, level)

    def margins(self, scores: Tensor, level: Tensor | float) -> Tensor:
        """How far each block is from being turned off, (..., N), in the unit of scores; a block is on above 0.

        For ``gate`` and ``blocks``.
        """
        level = torch.as_tensor(level, dtype=scores.dtype, device=scores.device)
        if self.kind == "gate":
            return (scores + level)[..., None] - (torch.arange(self.blocks, device=scores.device) + 0.5)
        return scores + level[..., None]

    def most_wanted(self, scores: Tensor, width: int) -> Tensor:
        """The ``width`` blocks (top-k) that tokens of these ``scores`` want most, (..., N) bool; for ``blocks``."""
        order = scores.argsort(dim=-1, descending=True, stable=True)[..., :width]
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)

    def widths(self, scores: Tensor, level: Tensor | float) -> Tensor:
        """How many blocks tokens of these ``scores`` use at ``level``, (...) int64 in 0..N; see :meth:`choose`."""
        if self.kind == "blocks":
            return self.choose(scores, level).sum(-1)
        level = torch.as_tensor(level, dtype=scores.dtype, device=scores.device)
        if self.kind in ("gate", "none"):
            return (scores + level - 0.5).ceil().clamp(0, self.blocks).long()
        if self.kind == "curve":
            share = torch.tensor(self.edges, dtype=scores.dtype, device=scores.device) / self.edges[-1]
            error = functional.pad(scores.exp(), (0, 1))  # (..., N + 1): the full width makes no error
            return (error + torch.exp(-level)[..., None] * share).argmin(-1)
        reached = scores.softmax(-1).cumsum(-1)[..., :-1] >= level[..., None]
        return self.blocks - reached.sum(-1)

    def level_range(self) -> tuple[float, float]:
        """A level at which (nearly) no block is on, and one at which all are."""
        if self.kind in ("gate", "none"):
            return -self.bound - 0.5, self.blocks + self.bound + 0.5
        if self.kind == "blocks":
            return -self.bound - 0.5, self.bound + 0.5
        return (-30.0, 40.0) if self.kind == "curve" else (0.0, 1.0 + 1e-6)


def solve_level(
    router: Router,
    scores: Sequence[Tensor],
    budget: float,
    *,
    iterations: int = 40,
    mean: Callable[[Tensor], Tensor] = lambda one: one,
) -> float:
    """The one level for all layers at which the mean active share over tokens and layers is ``budget``.

    The share rises in jumps, each at the score of some token. The level lies in the middle between the jump that
    reaches the budget and the next one, so that no token's block hangs on how its score was rounded.

    Args:
        router: Any layer's router; only its rule is used.
        scores: Scores of each layer, (tokens,) or (tokens, N).
        budget: Active FFN share, in (0, 1].
        iterations: Bisection steps, for each of the two jumps.
        mean: Takes the mean over processes, where each has some of the tokens.
    """
    share = torch.tensor(router.edges, dtype=torch.float64, device=scores[0].device) / router.edges[-1]

    def spent(level: float) -> float:
        return mean(torch.stack([share[router.widths(s, level)].mean() for s in scores]).mean()).item()

    def jump(low: float, high: float, reached: Callable[[float], bool]) -> tuple[float, float]:
        for _ in range(iterations):
            middle = (low + high) / 2
            low, high = (low, middle) if reached(spent(middle)) else (middle, high)
        return low, high

    bottom, top = router.level_range()
    _, level = jump(bottom, top, lambda got: got >= budget)
    reached = spent(level)
    if reached >= 1:
        return level
    below, _ = jump(level, top, lambda got: got > reached)
    return (level + below) / 2
