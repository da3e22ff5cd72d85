"""Where the dial's one number becomes a threshold for each site. Ships with every exported model.

:func:`solve_threshold` finds the threshold that spends a budget; calibration keeps one for each budget of its grid
(:class:`~dynaconv.dynamic.layout.DialTable`), :meth:`~dynaconv.dynamic.dial.Dial.thresholds` reads between them, and
:class:`Thresholds` holds what a call uses, on the device.

L sites, B sequences, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dynaconv.dynamic.routers.base import Router


class Thresholds:
    """The thresholds of a call: (L,), or (B, L) with one dial a sequence. Kept in place from call to call.

    A CUDA graph, and compiled code, read the same memory at every dial.

    Attributes:
        values: float32, on the device of the model.
    """

    values: Tensor

    def fill(self, rows: Sequence[float] | Sequence[Sequence[float]], device: torch.device) -> Tensor:
        """Writes ``rows`` into :attr:`values`, which moves only where its shape or its device changes."""
        with torch.inference_mode(False):  # what is filled in inference mode may be filled again outside of it
            wanted = torch.tensor(rows, dtype=torch.float32)
            held = getattr(self, "values", None)
            if held is None or held.shape != wanted.shape or held.device != device:
                self.values = wanted.to(device)
            else:
                held.copy_(wanted)
        return self.values


def solve_threshold(
    router: Router,
    scores: Sequence[Tensor],
    budget: float,
    *,
    iterations: int = 40,
    mean: Callable[[Tensor], Tensor] = lambda one: one,
) -> float:
    """The one threshold for all sites at which the mean active share over tokens and sites is ``budget``.

    The share falls in jumps as the threshold rises, each at the score of some token. The threshold lies in the middle
    between the jump that still leaves the budget and the next lower one, so that no token's block hangs on how its
    score was rounded.

    Args:
        router: Any site's router; only its rule is used.
        scores: Scores of each site, (tokens,) or (tokens, n).
        budget: Active FFN share, in (0, 1].
        iterations: Bisection steps, for each of the two jumps.
        mean: Takes the mean over processes, where each has some of the tokens.
    """

    def spent(threshold: float) -> float:
        shares = [router.choose(score, threshold).active_share(router.partition).mean() for score in scores]
        return mean(torch.stack(shares).mean()).item()

    def jump(low: float, high: float, reached: Callable[[float], bool]) -> tuple[float, float]:
        for _ in range(iterations):
            middle = (low + high) / 2
            low, high = (middle, high) if reached(spent(middle)) else (low, middle)
        return low, high

    everything, nothing = router.threshold_range()
    threshold, _ = jump(everything, nothing, lambda share: share >= budget)
    reached = spent(threshold)
    if reached >= 1:
        return threshold
    _, lowest = jump(everything, threshold, lambda share: share > reached)
    return (threshold + lowest) / 2
