"""Router kind ``class``: a classifier of how many blocks are enough. Ships with every exported model.

After DynaMoE (arXiv 2502.12325): scores are N logits over the smallest sufficient width 1..N. The width is the smallest
one that is enough with a probability of at least 1 - threshold.
"""

from __future__ import annotations

from torch import Tensor

from dynaconv.dynamic.routers.base import Router, as_threshold
from dynaconv.kernels.choice import Choice, Prefix


class ClassRouter(Router):
    """N logits a token."""

    kind = "class"
    objective = "class"

    def choose(self, scores: Tensor, threshold: Tensor | float) -> Choice:
        """See :meth:`Router.choose`."""
        enough = scores.softmax(-1).cumsum(-1)[..., :-1] >= 1 - as_threshold(threshold, scores)[..., None]
        return Prefix(self.blocks - enough.sum(-1))

    def threshold_range(self) -> tuple[float, float]:
        """See :meth:`Router.threshold_range`."""
        return -1e-3, 1.0  # sums of many probabilities end a little above or below 1
