"""A smaller checkpoint that starts from a larger one: weight subcloning, arXiv 2312.09299.

Along every axis the most important positions stay, in the order of their importance: channels of the residual stream
in one order for the network, neurons, heads and value channels in an order of each layer's own. Weight matrices are
multiplied with sqrt(fan_in / fan_in'), so that what they compute keeps its size; norms and biases are not. Layers that
change the residual stream least go.

Where the paper is silent (ours): heads go by whole kv groups, then within groups. Scores of attention keep their size
without a factor where their scale is 1 / sqrt(d), for that of the shorter head is larger by just the fan-in's factor;
where the config fixes the scale, queries get the factor. A tied head cannot be scaled by itself, so the final norm is;
Gemma's embeddings, which the model multiplies with sqrt(D), get the factor themselves and take the head along.

D residual width, F FFN width, L layers, Q query heads, K kv heads, d head width; primes are of the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.arch.surgery import Finish, Piece, Take
from dynaconv.config import SubcloneConfig
from dynaconv.convert.channels import query_key_channels
from dynaconv.convert.importance import Importance
from dynaconv.convert.resize import Resize
from dynaconv.convert.target import Shape, alignment_warnings, grouped, target_shape


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


def plan_subclone(
    checkpoint: Checkpoint, importance: Importance, wanted: SubcloneConfig, shape: Shape | None = None
) -> Resize:
    """Decides what stays of ``checkpoint`` and how it is scaled.

    Args:
        checkpoint: The parent.
        importance: What was measured on it.
        wanted: The target and the options.
        shape: The target, where it has been found already.

    Raises:
        ConfigError: No model of this family has the shape that was asked for, or it is larger than the parent.
        ArtifactError: A refit is asked for and the importance holds no second moments.
    """
    shape = target_shape(checkpoint, wanted) if shape is None else shape
    source = Shape.of(checkpoint)
    sizes = shape.sizes(checkpoint.sizes)
    kept = choose(checkpoint, importance, shape, ranked=wanted.order == "importance")
    config = checkpoint.family.resized(checkpoint.config, sizes, kept.layers)
    return Resize(
        config=config,
        takes=_takes(checkpoint, kept, source, shape, rescale=wanted.rescale),
        layers=kept.layers,
        finish=_finish(checkpoint, source, shape) if wanted.rescale else None,
        summary=_summary(source, shape, kept, importance, wanted),
        warnings=tuple(alignment_warnings(source, shape)),
    )


def choose(checkpoint: Checkpoint, importance: Importance, shape: Shape, *, ranked: bool) -> Kept:
    """What stays for ``shape``: the most important, or the first where not ``ranked``.

    Layers go by importance in any case.

    Raises:
        ConfigError: Rotary pairs do not fit into the shorter heads.
    """
    count, source = checkpoint.layers, Shape.of(checkpoint)
    all_layers = range(count)
    config = checkpoint.family.resized(checkpoint.config, shape.sizes(checkpoint.sizes), all_layers)
    query_key = query_key_channels(checkpoint, config, shape.head_dim, ranked=ranked)
    groups = [_heads(importance.heads[layer], source, shape, ranked=ranked) for layer in all_layers]
    return Kept(
        residual=_first(importance.residual, shape.residual, ranked=ranked),
        ffn={layer: _first(importance.neurons[layer], shape.ffn, ranked=ranked) for layer in all_layers},
        kv_heads={layer: kv_heads for layer, (kv_heads, _) in enumerate(groups)},
        heads={layer: heads for layer, (_, heads) in enumerate(groups)},
        query_key=query_key,
        value={
            layer: _first(importance.attention[layer].sum(0), shape.head_dim, ranked=ranked) for layer in all_layers
        },
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


def _first(scores: Tensor, count: int, *, ranked: bool) -> Tensor:
    """The ``count`` positions of the highest of ``scores`` (n,), highest first, ties by position; or the first."""
    return scores.argsort(descending=True, stable=True)[:count] if ranked else torch.arange(count)


def _heads(scores: Tensor, source: Shape, shape: Shape, *, ranked: bool) -> tuple[Tensor, Tensor]:
    """The kv heads (K',) and query heads (Q',) of one layer that stay, from the ``scores`` (Q,) of its query heads.

    Groups are ranked by the mean of their heads, then the heads within each group that stays.
    """
    grouped_scores = scores.view(source.kv_heads, source.group)
    kv_heads = _first(grouped_scores.mean(1), shape.kv_heads, ranked=ranked)
    within = [_first(grouped_scores[kv_head], shape.group, ranked=ranked) for kv_head in kv_heads.tolist()]
    return kv_heads, (kv_heads[:, None] * source.group + torch.stack(within)).flatten()


def _takes(checkpoint: Checkpoint, kept: Kept, source: Shape, shape: Shape, *, rescale: bool) -> list[Take]:
    """The edits: positions that stay along each axis, with the factor of what is contracted along it."""

    def gain(old: int, new: int) -> float:
        return math.sqrt(old / new) if rescale else 1.0

    takes = [
        Take("residual", kept.residual, contracted=gain(source.residual, shape.residual)),
        Take("ffn", kept.ffn, contracted=gain(source.ffn, shape.ffn)),
        Take("q_head", kept.heads, contracted=gain(source.heads, shape.heads)),
        Take("q_dim", kept.query_key, produced=_query_factors(checkpoint, kept, source, shape, rescale=rescale)),
        Take("k_dim", kept.query_key),
        Take("v_dim", kept.value, contracted=gain(source.head_dim, shape.head_dim)),
    ]
    if grouped(checkpoint):
        takes.append(Take("kv_head", kept.kv_heads))
    return takes


def _query_factors(
    checkpoint: Checkpoint, kept: Kept, source: Shape, shape: Shape, *, rescale: bool
) -> dict[int, float]:
    """What queries of each layer are multiplied with so that scores keep their size.

    A sum over d' channels instead of d is smaller by sqrt(d' / d). A scale of 1 / sqrt(d') makes up for that; a scale
    that the config fixes does not. Where scores are divided by the layer's number, a layer that moved up is told.
    """
    family = checkpoint.family
    fixed = family.attention_scale is not None and rescale
    factor = math.sqrt(source.head_dim / shape.head_dim) if fixed else 1.0
    factors = dict.fromkeys(range(source.layers), factor)
    if family.layer_scale is not None and family.setting(checkpoint.config, family.layer_scale):
        for new, old in enumerate(kept.layers):
            factors[old] *= (new + 1) / (old + 1)
    return factors


def _finish(checkpoint: Checkpoint, source: Shape, shape: Shape) -> Finish | None:
    """The factor of a head that is tied, where it can be given: the final norm, or embeddings that the model scales."""
    factor = math.sqrt(source.residual / shape.residual)
    if factor == 1:
        return None
    if checkpoint.family.embedding_scaled:
        part = "embedding"
    elif checkpoint.tied:
        part = "norm"
    else:
        return None

    def scaled(piece: Piece) -> Tensor:
        spec = piece.slot.spec
        if spec.part != part or piece.slot.layer is not None:
            return piece.tensor
        return (piece.tensor.float() + spec.offset).mul_(factor).sub_(spec.offset)

    return scaled


def _summary(source: Shape, shape: Shape, kept: Kept, importance: Importance, wanted: SubcloneConfig) -> dict[str, Any]:
    """What the manifest and the model card say."""
    return {
        "source": asdict(source),
        "target": asdict(shape),
        "kept_importance": kept_importance(kept, importance),
        "removed_layers": sorted(set(range(source.layers)) - set(kept.layers)),
        "parent_loss": importance.loss,
        "order": wanted.order,
        "rescale": wanted.rescale,
        "head_difference": wanted.head_difference,
        "refit": wanted.refit,
    }


def kept_importance(kept: Kept, importance: Importance) -> dict[str, float]:
    """Share of the importance of each axis that stays: of channels, of layers, and means over the layers that stay."""

    def mean(scores: Sequence[Tensor], chosen: Mapping[int, Tensor]) -> float:
        return sum(_share(scores[layer], chosen[layer]) for layer in kept.layers) / len(kept.layers)

    heads = importance.heads
    channels = [importance.attention[layer].sum(0) for layer in range(len(heads))]
    return {
        "residual": _share(importance.residual, kept.residual),
        "ffn": mean(list(importance.neurons), kept.ffn),
        "heads": mean(list(heads), kept.heads),
        "value_channels": mean(channels, kept.value),
        "layers": _share(importance.influence, torch.tensor(kept.layers)),
    }


def _share(scores: Tensor, chosen: Tensor) -> float:
    total = float(scores.double().sum())
    return float(scores[chosen].double().sum()) / total if total > 0 else len(chosen) / len(scores)
