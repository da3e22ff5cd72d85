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

from dynaconv.dynamic.cost import NEURONS, UnitCost
from dynaconv.dynamic.dial import Dial
from dynaconv.dynamic.layout import Layout
from dynaconv.dynamic.policy import ByThreshold
from dynaconv.dynamic.routers.base import Router


class Thresholds:
    """What a dial puts into routers: thresholds (L,), or (B, L) with one dial a sequence. Kept in place between calls.

    A CUDA graph, and compiled code, read the same memory at every dial.

    Attributes:
        values: float32, on the device of the model: thresholds, then thresholds of exact values, then weights of the
            sets of means, as far as there are any; (n,) or (B, n).
    """

    values: Tensor

    def fill(self, dials: Dial | Sequence[Dial], layout: Layout, device: torch.device) -> ByThreshold:
        """The policy of ``dials``, one for all sequences or one each, in :attr:`values`.

        These move only where their shape or their device changes.

        Raises:
            ValueError: As :meth:`Dial.thresholds`.
        """
        each = [dials] if isinstance(dials, Dial) else dials
        parts = [(dial.thresholds(layout), dial.exact(layout), dial.means(layout)) for dial in each]
        rows = [sum(part, ()) for part in parts]
        self._write(rows[0] if isinstance(dials, Dial) else rows, device)
        sizes = [len(part) for part in parts[0]]
        thresholds, exact, means = self.values.split(sizes, dim=-1)
        return ByThreshold(thresholds, exact=exact if sizes[1] else None, means=means if sizes[2] else None)

    def _write(self, rows: Sequence[float] | Sequence[Sequence[float]], device: torch.device) -> None:
        with torch.inference_mode(False):  # what is filled in inference mode may be filled again outside of it
            wanted = torch.tensor(rows, dtype=torch.float32)
            held = getattr(self, "values", None)
            if held is None or held.shape != wanted.shape or held.device != device:
                self.values = wanted.to(device)
            else:
                held.copy_(wanted)


def solve_threshold(
    router: Router,
    scores: Sequence[Tensor],
    budget: float,
    cost: UnitCost = NEURONS,
    *,
    iterations: int = 40,
    mean: Callable[[Tensor], Tensor] = lambda one: one,
) -> float:
    """The one threshold for all sites at which the mean cost over tokens and sites is ``budget``.

    What is spent falls in jumps as the threshold rises, each at the score of some token. The threshold lies in the
    middle between the jump that still leaves the budget and the next lower one, so that no token's block hangs on how
    its score was rounded.

    Args:
        router: Any site's router; only its rule is used.
        scores: Scores of each site, (tokens,) or (tokens, n).
        budget: In the unit of ``cost``, in (0, 1].
        cost: What blocks cost; every site's. Without one, the share of neurons.
        iterations: Bisection steps, for each of the two jumps.
        mean: Takes the mean over processes, where each has some of the tokens.
    """

    def spent(threshold: float) -> float:
        shares = [router.choose(score, threshold).active_share(router.partition).mean() for score in scores]
        active = mean(torch.stack(shares).mean()).item()
        return cost.of(active, active, 0.0)

    def jump(low: float, high: float, reached: Callable[[float], bool]) -> tuple[float, float]:
        for _ in range(iterations):
            middle = (low + high) / 2
            low, high = (middle, high) if reached(spent(middle)) else (low, middle)
        return low, high

    everything, nothing = router.threshold_range()
    threshold, _ = jump(everything, nothing, lambda share: share >= budget)
    reached = spent(threshold)
    if reached >= cost.fixed + cost.exact:
        return threshold
    _, lowest = jump(everything, threshold, lambda share: share > reached)
    return (threshold + lowest) / 2
