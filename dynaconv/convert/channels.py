"""Which channels of a shorter head stay.

Queries and keys meet channel by channel, so they share one choice. Rotary embeddings turn channels i and i + P of a
head together: whole pairs stay, and those whose frequencies are nearest to the ones that a shorter head will be turned
with, so that a pair goes on telling the distances that it has learned to tell. Values go their own way.

d channels of a head, P rotary pairs; d' and P' of the shorter head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.convert.rotary import Rotation, kinds, rotations
from dynaconv.errors import ConfigError

SMALLEST = 1e-30  # frequencies of 0 (channels that never turn) have no logarithm


def query_key_channels(
    checkpoint: Checkpoint, config: Mapping[str, Any], head_dim: int, say: Sequence[Tensor] | None
) -> dict[int, Tensor]:
    """Channels (d',) int64 of queries and keys that stay in each layer, in their order.

    Args:
        checkpoint: Whose heads are shortened.
        config: Content of ``config.json`` of the result, layers not yet removed.
        head_dim: d'.
        say: For each layer, how much each channel adds to the scores, (d,); by that go channels that no rotary
            embedding turns. ``None`` keeps the first.
    """
    layers, d = checkpoint.layers, checkpoint.sizes["q_dim"]
    if head_dim == d:
        return {layer: torch.arange(d) for layer in range(layers)}
    old = _by_layer(checkpoint.config, layers)
    if all(rotation is None for rotation in old):
        return {layer: _unturned(say[layer] if say is not None else None, 0, head_dim) for layer in range(layers)}
    new = _by_layer(config, layers)
    chosen: dict[int, Tensor] = {}
    for layer, (before, after) in enumerate(zip(old, new, strict=True)):
        assert before is not None
        assert after is not None
        pairs = nearest_pairs(before.frequencies, after.frequencies)
        count = 2 * len(before.frequencies)
        rest = _unturned(say[layer] if say is not None else None, count, head_dim - 2 * len(pairs))
        chosen[layer] = torch.cat([pairs, pairs + count // 2, rest])
    return chosen


def nearest_pairs(old: Tensor, new: Tensor) -> Tensor:
    """For each of the ``new`` frequencies (P',) one of the ``old`` (P,), none twice, P' <= P: (P',) int64.

    Minimises the sum of |log old - log new|. With both sorted the best choice never crosses, so one table of
    P x P' sums finds it.
    """
    by_old, by_new = old.argsort(stable=True), new.argsort(stable=True)
    cost = (new[by_new].clamp_min(SMALLEST).log()[:, None] - old[by_old].clamp_min(SMALLEST).log()).abs().double()
    count, total = cost.shape
    best = torch.full((count + 1, total + 1), torch.inf, dtype=torch.float64)
    best[0] = 0
    for i in range(1, count + 1):
        for j in range(i, total + 1):
            best[i, j] = torch.minimum(best[i, j - 1], best[i - 1, j - 1] + cost[i - 1, j - 1])
    chosen, j = torch.empty(count, dtype=torch.int64), total
    for i in range(count, 0, -1):
        while best[i, j] == best[i, j - 1]:
            j -= 1
        chosen[by_new[i - 1]] = by_old[j - 1]
        j -= 1
    return chosen


def _by_layer(config: Mapping[str, Any], layers: int) -> list[Rotation | None]:
    """The rotary embedding of each layer."""
    found = rotations(config)
    return [found.get(kind) for kind in kinds(found, config, layers)]


def _unturned(say: Tensor | None, start: int, count: int) -> Tensor:
    """``count`` of the channels from ``start`` on, which no rotary embedding turns: the weightiest, or the first."""
    if say is None:
        return torch.arange(start, start + count)
    return start + say[start:].argsort(descending=True, stable=True)[:count]


def check_head_dim(checkpoint: Checkpoint, head_dim: int) -> None:
    """Refuses heads of ``head_dim`` channels that cannot be turned in pairs.

    Raises:
        ConfigError: Rotary pairs do not fit into the shorter head, or each has a scaling of its own.
    """
    d = checkpoint.sizes["q_dim"]
    found = rotations(checkpoint.config).values()
    if head_dim == d or not found:
        return
    turned = max(2 * len(rotation.frequencies) for rotation in found)

    def fits(size: int) -> bool:
        pairs, odd = divmod(int(size * turned / d), 2)
        return size % 2 == 0 and pairs > 0 and not odd

    if not fits(head_dim):
        near = sorted(sorted(filter(fits, range(1, d + 1)), key=lambda size: abs(size - head_dim))[:2])
        raise ConfigError(
            f"head_dim is {head_dim}, but rotary embeddings turn channels in pairs",
            where="subclone",
            expected=f"an even number of channels to turn, which is {turned} in {d} now",
            hint=" or ".join(f"head_dim={size}" for size in near),
        )
    if any(rotation.kind == "longrope" for rotation in found):
        raise ConfigError(
            "head_dim cannot shrink with longrope scaling, which lists a factor for each pair of channels",
            where="subclone",
            hint="leave head_dim as it is and take fewer heads",
        )
