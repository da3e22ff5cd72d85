"""Several sources mixed by weight: which source each training window is from, as a pure function of its place.

Source k with weight w_k (all together 1) gives its j-th window at the time (j + u_k) / w_k, where u_k in [0, 1) is
drawn from the seed. Sorted by time, the windows are the training order. So any stretch of it has each source's share to
within a window for each source, and the j-th window of a source is the j-th of its own training order: an epoch of a
source has every window of it once, and a source with less text begins its next epoch sooner.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dynaconv.data.windows import Batch, Windows

_REACH = 2  # a window's time is off its place by at most the number of sources and 1; this many times it is looked at


class MixedWindows(Windows):
    """Windows of several sources. As a whole (``take``, ``len``) they are all windows, one source behind the other.

    Args:
        sources: Each with at least one window, all of one length.
        weights: Shares of the training windows; they add up to 1.
    """

    def __init__(self, sources: Sequence[Windows], weights: Sequence[float]) -> None:
        super().__init__(torch.empty(0, dtype=torch.int32), sources[0].length)
        self.sources, self.weights = list(sources), list(weights)
        self.ends = torch.tensor([len(source) for source in sources]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def total_tokens(self) -> int:
        """Tokens in all the windows together, without padding."""
        return sum(source.total_tokens for source in self.sources)

    def take(self, indices: Sequence[int] | Tensor, offsets: Sequence[int] | Tensor | int = 0) -> Batch:
        """The windows at ``indices`` (B,), each on its source's grid shifted by its offset."""
        chosen = torch.as_tensor(indices)
        shifts = torch.as_tensor(offsets).expand(len(chosen))
        owner = torch.searchsorted(self.ends, chosen, right=True)  # (B,)
        rows, parts = [], []
        for k, source in enumerate(self.sources):
            own = (owner == k).nonzero().flatten()
            if len(own):
                rows.append(own)
                parts.append(source.take(chosen[own] - (self.ends[k] - len(source)), shifts[own]))
        return _in_order(parts, torch.cat(rows))

    def drawn(self, places: Iterable[int], seed: int) -> Batch:
        """The windows at ``places`` (from 0) of the mixed training order."""
        owned: dict[int, list[tuple[int, int]]] = {}
        for row, place in enumerate(places):
            source, turn = turn_at(place, tuple(self.weights), seed)
            owned.setdefault(source, []).append((row, turn))
        parts = [self.sources[k].drawn([turn for _, turn in turns], seed) for k, turns in owned.items()]
        return _in_order(parts, torch.tensor([row for turns in owned.values() for row, _ in turns]))


def turn_at(place: int, weights: Sequence[float], seed: int) -> tuple[int, int]:
    """Which source gives the window at ``place`` (from 0), and how many it has given before."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(len(weights), generator=generator, dtype=torch.float64).tolist()
    begin = max(0.0, place - _REACH * len(weights))
    before, turns = 0, []
    for k, (weight, start) in enumerate(zip(weights, starts, strict=True)):
        first = max(0, math.floor(begin * weight - start) - 1)
        while (first + start) / weight < begin:
            first += 1
        before += first
        for turn in range(first, first + math.ceil(2 * _REACH * len(weights) * weight) + 2):
            turns.append(((turn + start) / weight, k, turn))
    turns.sort()
    return turns[place - before][1:]


def _in_order(parts: list[Batch], rows: Tensor) -> Batch:
    """The rows of ``parts``, one behind the other, put where ``rows`` says."""
    order = rows.argsort()
    ids = torch.cat([part.input_ids for part in parts])[order]
    masks: list[Tensor | None] = []
    for name in ("attention_mask", "loss_mask"):
        found = [getattr(part, name) for part in parts]
        if all(mask is None for mask in found):
            masks.append(None)
            continue
        filled = [
            torch.ones_like(part.input_ids, dtype=torch.bool) if mask is None else mask
            for part, mask in zip(parts, found, strict=True)
        ]
        masks.append(torch.cat(filled)[order])
    return Batch(ids, *masks)
