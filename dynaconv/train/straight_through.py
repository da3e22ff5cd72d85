"""How routers learn from the losses at the dial: straight-through gradients, with their common part taken out.

A block is on where its margin is above 0. Its gradient is that of sigmoid(margin / temperature), whether it is on or
off (straight-through estimator, Bengio et al., arXiv 1308.3432).

B sequences, T tokens, D residual width, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dynaconv.dynamic.ffn import DynamicFFN
from dynaconv.dynamic.policy import Decision
from dynaconv.dynamic.recorder import Record, Recorder
from dynaconv.dynamic.routers.base import Router
from dynaconv.dynamic.site import Site
from dynaconv.kernels.choice import Soft
from dynaconv.train.tokens import real_tokens


@dataclass(frozen=True)
class StraightThrough:
    """Policy of routers that are trained end to end.

    Attributes:
        threshold: Of all routers.
        temperature: Width of the sigmoid, in the unit of scores.
    """

    threshold: float
    temperature: float

    def decide(self, site: Site, router: Router, x: Tensor) -> Decision:
        """Weights (..., N) of 0 and 1 that carry the gradient of the sigmoid."""
        scores = router(x)
        margins = router.margins(scores, self.threshold)
        soft = torch.sigmoid(margins / self.temperature)
        return Decision(Soft((margins > 0).float() + soft - soft.detach()), scores)


class ScoreGradients(Recorder):
    """Keeps the routers' inputs and scores, the latter with their gradients once backward has run.

    Args:
        mask: (B, T) bool, False on padding; ``None`` where nothing is padded.
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        self.mask = mask
        self.inputs: dict[int, Tensor] = {}
        self.trained_scores: dict[int, Tensor] = {}

    def record(self, record: Record) -> None:
        """See :meth:`Recorder.record`."""
        super().record(record)
        if record.scores is not None and record.scores.requires_grad:
            record.scores.retain_grad()
            self.trained_scores[record.site.index], self.inputs[record.site.index] = record.scores, record.x.detach()

    def centering(self, ffns: list[DynamicFFN], mean: Callable[[Tensor], Tensor] = lambda one: one) -> Tensor:
        """A loss whose gradient takes the mean over tokens and sites (and blocks) out of the scores' gradients.

        Only relative scores matter, since the budget fixes the mean. Call it after the backward pass.

        Args:
            ffns: The model's FFNs.
            mean: Takes the mean over ranks of means over tokens that are not padding.
        """
        features = ffns[0].router.features
        gradients = [scores.grad for scores in self.trained_scores.values() if scores.grad is not None]
        means = [real_tokens(gradient, self.mask, features=features).mean() for gradient in gradients]
        common = mean(torch.stack(means).mean())
        # Called as modules, with inputs that want a gradient: by those ZeRO 3 gathers weights, and drops them.
        scores = [ffn(self.inputs[ffn.site.index].requires_grad_(), scores_only=True) for ffn in ffns]
        real = [real_tokens(score, self.mask, features=features) for score in scores]
        return torch.stack([(-common * score).sum() for score in real]).sum()
