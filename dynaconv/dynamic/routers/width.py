"""Router kind ``width``: one score, the width that the token wants. Ships with every exported model.

Trained end to end. A score is in blocks, to either side of what all tokens get: width = round(score - threshold).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynaconv.dynamic.routers.base import Router, as_threshold, nearest_width
from dynaconv.kernels.choice import Choice


class WidthRouter(Router):
    """One bounded score a token."""

    kind = "width"
    features = 0
    objective = "dial"

    def outputs(self) -> int:
        """One."""
        return 1

    def bounded(self, raw: Tensor) -> Tensor:
        """Scores (...), between -bound and bound."""
        return self.soft_cap(raw.squeeze(-1))

    def choose(self, scores: Tensor, threshold: Tensor | float) -> Choice:
        """See :meth:`Router.choose`."""
        return nearest_width(scores, threshold, self.blocks)

    def margins(self, scores: Tensor, threshold: Tensor | float) -> Tensor:
        """Of block j (from 1): score - threshold - (j - 1/2)."""
        wanted = (scores - as_threshold(threshold, scores))[..., None]
        return wanted - (torch.arange(self.blocks, device=scores.device) + 0.5)

    def threshold_range(self) -> tuple[float, float]:
        """See :meth:`Router.threshold_range`."""
        return -self.blocks - self.bound - 0.5, self.bound + 0.5
