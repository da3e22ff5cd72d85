"""Policies of the training passes: what the routers see, what they decide, and what they learn from.

A step runs the model twice: once at the full dial (:class:`Scored` leaves each layer's router inputs and scores
behind, from which the level of the sampled budget is solved), once at that level, under one of the policies below.

B batch, T tokens, M of them that are not padding, D residual width, F FFN width, N blocks. Padding counts nowhere: not
in the level, nor in what routers learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from dynaconv.dynamic.context import using
from dynaconv.dynamic.ffn import DynamicFFN
from dynaconv.profile.curves import agreements, log_errors, relative_errors, width_by_cosine


class Scored:
    """All blocks on; router inputs (B, T, D) and scores are kept by layer."""

    def __init__(self) -> None:
        self.inputs: dict[int, Tensor] = {}
        self.scores: dict[int, Tensor] = {}

    def decide(self, ffn: DynamicFFN, x: Tensor) -> Tensor | None:
        """All blocks."""
        with torch.no_grad():
            self.inputs[ffn.layer] = x.detach()
            self.scores[ffn.layer] = ffn.router(x.detach())
        return None


class Gated:
    """Router target ``gate``: blocks on where the router's margin for them is above 0, a gradient to every block.

    Of nested experts the margin of block j (from 1) is s + level - j + 1/2, of routed ones s_j + level. The gradient
    goes straight through sigmoid(margin / temperature), also where the block is off.

    Args:
        level: Of all routers.
        temperature: Width of the sigmoid, in the unit of scores.
        real: (B, T) bool, False on padding; ``None`` where nothing is padded.
    """

    def __init__(self, level: float, temperature: float, real: Tensor | None = None) -> None:
        self.level, self.temperature, self.real = level, temperature, real
        self.scores: dict[int, Tensor] = {}
        self.inputs: dict[int, Tensor] = {}

    def decide(self, ffn: DynamicFFN, x: Tensor) -> Tensor | None:
        """Entries in {0, 1}, (B, T, N), that carry the straight-through gradient."""
        score = ffn.router(x)
        if score.requires_grad and ffn.layer not in self.scores:
            score.retain_grad()
            self.scores[ffn.layer], self.inputs[ffn.layer] = score, x.detach()
        margin = ffn.router.margins(score, self.level)
        soft = torch.sigmoid(margin / self.temperature)
        return (margin > 0).float() + soft - soft.detach()

    def centre(self, ffns: list[DynamicFFN], mean: Callable[[Tensor], Tensor] = lambda one: one) -> Tensor:
        """A loss whose gradient takes the mean over tokens and layers (and blocks) out of the routers' gradients.

        Only relative scores matter: the budget fixes the mean. Call after the backward pass of the gated loss.

        Args:
            ffns: The model's FFNs.
            mean: Takes the mean over ranks of means over real tokens.
        """
        features = ffns[0].router.features
        grads = [score.grad for score in self.scores.values() if score.grad is not None]
        means = [real_tokens(grad, self.real, features=features).mean() for grad in grads]
        common = mean(torch.stack(means).mean())
        # Called as modules, with inputs that want a gradient: ZeRO 3 gathers weights, and drops them, by those.
        with using(Scoring()):
            scores = [ffn(self.inputs[ffn.layer].requires_grad_()) for ffn in ffns]
        real = [real_tokens(score, self.real, features=features) for score in scores]
        return torch.stack([(-common * score).sum() for score in real]).sum()


class Scoring:
    """Makes an FFN return its router's scores, and nothing else."""

    scores_only = True

    def decide(self, ffn: DynamicFFN, x: Tensor) -> Tensor:
        """The scores."""
        return ffn.router(x)


class Labelled:
    """Router targets ``curve`` and ``class``: widths by the router's rule, targets from the curve of the same pass.

    Args:
        level: Of all routers.
        theta: Agreement that a ``class`` label asks for.
        real: (B, T) bool, False on padding; ``None`` where nothing is padded.
        measured: Also keep, by layer, the share of tokens whose width or class is the label's.
    """

    def __init__(self, level: float, theta: float, real: Tensor | None = None, *, measured: bool = False) -> None:
        self.level, self.theta, self.real, self.measured = level, theta, real, measured
        self.losses: dict[int, Tensor] = {}
        self.accuracies: dict[int, float] = {}
        self._scores: dict[int, Tensor] = {}

    def decide(self, ffn: DynamicFFN, x: Tensor) -> Tensor | None:
        """Integer widths (B, T); the trunk gets no gradient from the router."""
        self._scores[ffn.layer] = score = ffn.router(x.detach())
        return ffn.router.widths(score.detach(), self.level)

    def observe(self, ffn: DynamicFFN, x: Tensor, h: Tensor) -> None:
        """Measures the curve of activations ``h`` (B, T, F) and the router's loss against it."""
        score = real_tokens(self._scores[ffn.layer], self.real, features=1)
        tokens, down = real_tokens(h.detach(), self.real, features=1).float(), ffn.weights().down.detach()
        if ffn.router.kind == "curve":
            target = log_errors(relative_errors(tokens, down, ffn.edges))
            loss = functional.mse_loss(score, target)
        else:
            target = width_by_cosine(agreements(tokens, down, ffn.edges).cosines, self.theta)
            loss = functional.cross_entropy(score, target - 1)
        self.losses.setdefault(ffn.layer, loss)  # a recomputation measures it again: same value, counted once
        if self.measured and ffn.layer not in self.accuracies:
            self.accuracies[ffn.layer] = self._accuracy(ffn, score.detach(), target)

    def loss(self) -> Tensor:
        """Mean over layers."""
        return torch.stack(list(self.losses.values())).mean()

    def _accuracy(self, ffn: DynamicFFN, score: Tensor, target: Tensor) -> float:
        if ffn.router.kind == "class":
            right = score.argmax(-1) + 1 == target
        else:
            right = ffn.router.widths(score, self.level) == ffn.router.widths(target, self.level)
        return right.float().mean().item()


def real_tokens(values: Tensor, real: Tensor | None, *, features: int = 0) -> Tensor:
    """``values`` of the tokens that are ``real`` (B, T), or of all: (M,), or (M, n) where there are ``features``.

    Some models call their FFNs with (B, T) tokens, some (OPT) with B * T.
    """
    flat = values.flatten(0, values.dim() - 1 - features)
    return flat if real is None else flat[real.flatten()]


def spent_share(widths: Mapping[int, Tensor], edges: tuple[int, ...]) -> float:
    """Mean active share of integer ``widths`` by layer, of any shape."""
    share = torch.tensor(edges, dtype=torch.float64) / edges[-1]
    return sum(float(share[used.cpu()].mean()) for used in widths.values()) / len(widths)
