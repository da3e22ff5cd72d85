"""Rotary pairs by their frequencies: what growing and shrinking heads must respect.

Queries and keys meet channel by channel, and rotary embeddings turn the channels i and i + P of a head together, by an
angle that depends on the length of the head. A head of another length keeps its scores only where its pairs keep their
frequencies. These come from transformers' own rotary code, so every scaling rule is the model's own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynaconv.errors import ConfigError

TOLERANCE = 2e-7  # relative: two roundings of float32; a larger difference would show at long distances
MOVING = ("dynamic", "longrope")  # kinds whose frequencies change with the length of the text


@dataclass(frozen=True)
class Rotation:
    """Rotary embedding of one kind of layer.

    Attributes:
        kind: Its ``rope_type``.
        frequencies: Angle per position (P,) float32 of each pair of channels (i, i + P). Channels from 2P on are not
            turned.
        scaling: What rotated channels are multiplied with.
    """

    kind: str
    frequencies: Tensor
    scaling: float


def rotations(config: Mapping[str, Any]) -> dict[str | None, Rotation]:
    """The rotary embedding of every kind of layer, ``{}`` for a model without.

    Args:
        config: Content of ``config.json``.

    Returns:
        By ``layer_types`` where the model has one for each, else one under ``None``.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    made = AutoConfig.for_model(**config)
    module = sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(made)].__module__]
    classes = [value for name, value in vars(module).items() if name.endswith("RotaryEmbedding")]
    if not classes:
        return {}
    embedding = classes[0](made)
    found: dict[str | None, Rotation] = {}
    for name, buffer in embedding.named_buffers():
        if not name.endswith("inv_freq") or name.endswith("original_inv_freq"):
            continue
        layer_type = name.removesuffix("inv_freq").removesuffix("_") or None
        kind = embedding.rope_type if layer_type is None else embedding.rope_type[layer_type]
        scaling = getattr(embedding, f"{layer_type}_attention_scaling" if layer_type else "attention_scaling")
        found[layer_type] = Rotation(kind, buffer.float(), float(scaling))
    return found


def kinds(found: Mapping[str | None, Rotation], config: Mapping[str, Any], layers: int) -> list[str | None]:
    """Under which key of :func:`rotations` each of ``layers`` layers has its rotary embedding."""
    if set(found) <= {None}:
        return [None] * layers
    from transformers import AutoConfig

    return list(AutoConfig.for_model(**config).layer_types)


@dataclass(frozen=True)
class Channels:
    """Where the query and key channels of a longer head come from.

    Attributes:
        index: Old channel (m*d,) of every new one; each old one m times.
        query: Factor (m*d,) float32 of every new query channel that keeps all scores. Zero where a pair turns at a
            frequency that the short head did not have: its keys are there, so that it can be learned.
    """

    index: Tensor
    query: Tensor


def grown(old: Rotation | None, new: Rotation | None, head_dim: int, factor: int, *, fixed_scale: bool) -> Channels:
    """Channels of a head of ``factor * head_dim`` whose scores are those of the head of ``head_dim``.

    Args:
        old: Rotary embedding of the source, ``None`` without.
        new: Rotary embedding of the result.
        head_dim: d, channels of a head of the source.
        factor: m.
        fixed_scale: Whether the config fixes the scale of the scores; else it is 1 / sqrt(channels), and the queries
            make up for it.

    Raises:
        ConfigError: The longer head has no pairs of the old frequencies.
    """
    gain = 1.0 if fixed_scale else math.sqrt(factor)
    if old is None or new is None:
        return Channels(torch.arange(head_dim).repeat(factor), torch.full((factor * head_dim,), gain / factor))
    pairs, matched = _grown_pairs(old, new, factor)
    count = len(old.frequencies)
    passed = torch.arange(2 * count, head_dim).repeat(factor)
    turned = matched.float() * gain
    return Channels(
        torch.cat([pairs, pairs + count, passed]),
        torch.cat([turned, turned, torch.full((len(passed),), gain / factor)]),
    )


def _grown_pairs(old: Rotation, new: Rotation, factor: int) -> tuple[Tensor, Tensor]:
    """The old pair (m*P,) of every new pair, each old one m times, and whether (m*P,) the new pair turns as it does."""
    if any(kind in rotation.kind for kind in MOVING for rotation in (old, new)):
        raise _refused(f"with rotary scaling {old.kind!r} the frequencies change with the length of the text")
    if len(new.frequencies) != factor * len(old.frequencies) or new.scaling != old.scaling:
        raise _refused(
            f"heads {factor} times as long would turn {len(new.frequencies)} pairs of channels, "
            f"which is not {factor} times {len(old.frequencies)}, or scale them differently"
        )
    pairs, free = torch.full((len(new.frequencies),), -1), torch.ones(len(new.frequencies), dtype=torch.bool)
    for pair, frequency in enumerate(old.frequencies):
        distance = (new.frequencies - frequency).abs().masked_fill(~free, math.inf)
        place = int(distance.argmin())
        if distance[place] > TOLERANCE * frequency:
            raise _refused(
                f"with rotary scaling {old.kind!r}, no pair of channels of a head {factor} times as long "
                f"turns by {float(frequency):.6g} per position as pair {pair} does now"
            )
        pairs[place], free[place] = pair, False
    pairs[free] = torch.arange(len(old.frequencies)).repeat_interleave(factor - 1)
    return pairs, ~free


def _refused(reason: str) -> ConfigError:
    return ConfigError(f"head_dim cannot grow: {reason}", hint="head_dim=1, and heads=... for more attention")
