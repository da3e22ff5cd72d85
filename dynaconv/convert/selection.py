"""What stays of a checkpoint that becomes smaller: the most important positions of every axis, in that order.

The residual stream has one order for the network, neurons, heads and value channels have one in each layer. Heads go by
whole kv groups, then within the groups that stay. Queries and keys share their channels (:mod:`.channels`).

D residual width, F FFN width, L layers, Q query heads, K kv heads, d head width; primes are of the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.convert.channels import query_key_channels
from dynaconv.convert.importance import Importance
from dynaconv.convert.target import Shape


@dataclass(frozen=True)
class Kept:
    """What stays of a checkpoint, int64 positions in their new order, by layer but for the residual stream.

    Attributes:
        residual: (D',).
        ffn: (F',) of each layer.
        kv_heads: (K',) of each layer; as many as query heads where the family has no grouped queries.
        heads: (Q',) of each layer, the groups of ``kv_heads`` one after another.
        query_key: (d',) channels of queries and keys.
        value: (d',) channels of values.
        layers: (L',) layers, ascending.
    """

    residual: Tensor
    ffn: Mapping[int, Tensor]
    kv_heads: Mapping[int, Tensor]
    heads: Mapping[int, Tensor]
    query_key: Mapping[int, Tensor]
    value: Mapping[int, Tensor]
    layers: tuple[int, ...]


def choose(checkpoint: Checkpoint, importance: Importance, shape: Shape, *, ranked: bool) -> Kept:
    """What stays for ``shape``: the most important, or the first where not ``ranked``.

    Layers go by importance in any case.
    """
    count, source = checkpoint.layers, Shape.of(checkpoint)
    all_layers = range(count)
    config = checkpoint.family.resized(checkpoint.config, shape.sizes(checkpoint.sizes), all_layers)
    known = importance.query_key
    say = list(known) if ranked and known is not None else None
    query_key = query_key_channels(checkpoint, config, shape.head_dim, say)
    groups = [heads_that_stay(importance.heads[layer], source, shape, ranked=ranked) for layer in all_layers]
    return Kept(
        residual=first(importance.residual, shape.residual, ranked=ranked),
        ffn={layer: first(importance.neurons[layer], shape.ffn, ranked=ranked) for layer in all_layers},
        kv_heads={layer: kv_heads for layer, (kv_heads, _) in enumerate(groups)},
        heads={layer: heads for layer, (_, heads) in enumerate(groups)},
        query_key=query_key,
        value={layer: first(importance.attention[layer].sum(0), shape.head_dim, ranked=ranked) for layer in all_layers},
        layers=kept_layers(importance.influence, shape.layers),
    )


def kept_layers(influence: Tensor, count: int) -> tuple[int, ...]:
    """The ``count`` of L layers that stay, ascending: the most influential, with a prior for the ends.

    Influence (L,) is multiplied with 1 + z^2, where z runs from -1 at the first layer to 1 at the last: of layers that
    do equally little the middle ones go (ours; that they should go first is the paper's). The first and the last layer
    stay whatever their influence.
    """
    layers = len(influence)
    if count == layers:
        return tuple(range(layers))
    place = torch.linspace(-1, 1, layers)
    score = influence.float() * (1 + place.square())
    score[0] = score[-1] = math.inf
    return tuple(sorted(score.argsort(descending=True, stable=True)[:count].tolist()))


def first(scores: Tensor, count: int, *, ranked: bool) -> Tensor:
    """The ``count`` positions of the highest of ``scores`` (n,), highest first, ties by position; or the first."""
    return scores.argsort(descending=True, stable=True)[:count] if ranked else torch.arange(count)


def heads_that_stay(scores: Tensor, source: Shape, shape: Shape, *, ranked: bool) -> tuple[Tensor, Tensor]:
    """The kv heads (K',) and query heads (Q',) of one layer that stay, from the ``scores`` (Q,) of its query heads.

    Groups are ranked by the mean of their heads, then the heads within each group that stays.
    """
    grouped_scores = scores.view(source.kv_heads, source.group)
    kv_heads = first(grouped_scores.mean(1), shape.kv_heads, ranked=ranked)
    within = [first(grouped_scores[kv_head], shape.group, ranked=ranked) for kv_head in kv_heads.tolist()]
    return kv_heads, (kv_heads[:, None] * source.group + torch.stack(within)).flatten()


def kept_importance(kept: Kept, importance: Importance) -> dict[str, float]:
    """Share of the importance of each axis that stays: of channels, of layers, and means over the layers that stay."""

    def mean(scores: Sequence[Tensor], chosen: Mapping[int, Tensor]) -> float:
        return sum(share(scores[layer], chosen[layer]) for layer in kept.layers) / len(kept.layers)

    heads = importance.heads
    channels = [importance.attention[layer].sum(0) for layer in range(len(heads))]
    return {
        "residual": share(importance.residual, kept.residual),
        "ffn": mean(list(importance.neurons), kept.ffn),
        "heads": mean(list(heads), kept.heads),
        "value_channels": mean(channels, kept.value),
        "layers": share(importance.influence, torch.tensor(kept.layers)),
    }


def share(scores: Tensor, chosen: Tensor) -> float:
    """Share of ``scores`` (n,) that the positions ``chosen`` have."""
    total = float(scores.double().sum())
    return float(scores[chosen].double().sum()) / total if total > 0 else len(chosen) / len(scores)
