"""Router kind ``linear``: a score for each block of routed experts. Ships with every exported model.

A block is on where its score is above the threshold. In closed form a score predicts the logarithm of the norm of what
the block adds (D2DMoE, arXiv 2310.04361), in nats; then it is trained end to end.
"""

from __future__ import annotations

from torch import Tensor

from dynaconv.dynamic.routers.base import Router, as_threshold, top_mask
from dynaconv.kernels.choice import Choice, Subset


class LinearRouter(Router):
    """N bounded scores a token."""

    kind = "linear"
    experts = "routed"
    objective = "dial"
    closed_form = True

    def bounded(self, raw: Tensor) -> Tensor:
        """Scores (..., N), between -bound and bound."""
        return self.soft_cap(raw)

    def choose(self, scores: Tensor, threshold: Tensor | float) -> Choice:
        """See :meth:`Router.choose`."""
        return Subset(scores > as_threshold(threshold, scores)[..., None])

    def margins(self, scores: Tensor, threshold: Tensor | float) -> Tensor:
        """Score - threshold."""
        return scores - as_threshold(threshold, scores)[..., None]

    def top(self, x: Tensor, width: int) -> Choice:
        """See :meth:`Router.top`."""
        return top_mask(self(x), width)

    def threshold_range(self) -> tuple[float, float]:
        """See :meth:`Router.threshold_range`."""
        return -self.bound - 0.5, self.bound + 0.5
