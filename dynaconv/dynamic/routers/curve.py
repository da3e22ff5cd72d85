"""Router kind ``curve``: the predicted error of every width. Ships with every exported model.

After D2DMoE (arXiv 2310.04361), with an argmin in place of its threshold: scores are N predictions of log t_n, t_n
being the error that a width of n blocks would make, and the width is argmin_n t_n + exp(threshold) * share_n. The
threshold is the logarithm of what the whole FFN costs, in units of error.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dynaconv.dynamic.routers.base import Router, as_threshold
from dynaconv.kernels.choice import Choice, Prefix


class CurveRouter(Router):
    """N log errors a token."""

    kind = "curve"
    objective = "curve"
    closed_form = True

    def choose(self, scores: Tensor, threshold: Tensor | float) -> Choice:
        """See :meth:`Router.choose`."""
        share = self.partition.prefix_shares(scores.device).to(scores.dtype)
        error = functional.pad(scores.exp(), (0, 1))  # (..., N + 1): the full width makes no error
        return Prefix((error + torch.exp(as_threshold(threshold, scores))[..., None] * share).argmin(-1))

    def threshold_range(self) -> tuple[float, float]:
        """See :meth:`Router.threshold_range`."""
        return -40.0, 30.0
