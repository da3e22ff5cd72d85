"""Router kind ``none``: no parameters, the same width for every token. Ships with every exported model."""

from __future__ import annotations

from torch import Tensor

from dynaconv.dynamic.routers.base import Router, nearest_width
from dynaconv.kernels.choice import Choice


class UniformRouter(Router):
    """The width is minus the threshold, rounded."""

    kind = "none"
    features = 0
    exportable = ""

    def outputs(self) -> int:
        """One, always zero."""
        return 1

    def bounded(self, raw: Tensor) -> Tensor:
        """Zeros (...)."""
        return raw.squeeze(-1)

    def choose(self, scores: Tensor, threshold: Tensor | float) -> Choice:
        """See :meth:`Router.choose`."""
        return nearest_width(scores, threshold, self.blocks)

    def threshold_range(self) -> tuple[float, float]:
        """See :meth:`Router.threshold_range`."""
        return -self.blocks - 0.5, 0.5
