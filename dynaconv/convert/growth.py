"""How much larger a checkpoint becomes along each axis: what was asked for, made whole, or refused with the choices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
from torch import Tensor

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.config import HypercloneConfig
from dynaconv.errors import CheckpointError, ConfigError, DynaconvError

WHOLE = {
    "residual": "norms keep their statistics only if every channel comes equally often",
    "heads": "groups of query heads stay equal only if every head comes equally often",
    "kv_heads": "groups of query heads stay equal only if every head comes equally often",
    "head_dim": "scores stay only if every channel of a head comes equally often",
}


@dataclass(frozen=True)
class Growth:
    """What a checkpoint becomes.

    Attributes:
        residual: How often each channel of the residual stream comes.
        ffn: Neurons of the result.
        heads: How often each query head comes.
        kv_heads: How often each key and value head comes; ``heads`` in families without grouped queries.
        head_dim: How often each channel of a head comes.
        layers: Decoder layers of the result.
    """

    residual: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int

    def sizes(self, old: dict[str, int]) -> dict[str, int]:
        """Length of every axis of the result, from those of the source."""
        times = {"residual": self.residual, "q_head": self.heads, "kv_head": self.kv_heads}
        times |= dict.fromkeys(("q_dim", "k_dim", "v_dim"), self.head_dim)
        return {axis: self.ffn if axis == "ffn" else size * times.get(axis, 1) for axis, size in old.items()}


def growth_of(checkpoint: Checkpoint, wanted: HypercloneConfig) -> Growth:
    """What ``wanted`` makes of ``checkpoint``.

    Raises:
        ConfigError: A factor is not whole or less than 1, heads cannot be shared evenly, sizes do not fit each other,
            or nothing would grow. Lists all that is wrong, each with the nearest choices.
    """
    problems: list[str] = []

    def take(value: Any) -> Any:
        """A checked value, or 1 in place of a mistake that is reported at the end."""
        if isinstance(value, DynaconvError):
            problems.append(value.what)
            return 1
        return value

    sizes, asked = checkpoint.sizes, wanted
    both = take(_whole("factor", asked.factor, sizes["residual"]))
    residual, heads = (
        both if value is None else take(_whole(name, value, sizes[axis]))
        for name, value, axis in (("residual", asked.residual, "residual"), ("heads", asked.heads, "q_head"))
    )
    grown = Growth(
        residual=residual,
        ffn=sizes["ffn"] * both if asked.ffn is None else take(_neurons(asked.ffn, sizes["ffn"])),
        heads=heads,
        kv_heads=take(_kv_heads(checkpoint, str(asked.kv_heads), heads)),
        head_dim=take(_whole("head_dim", asked.head_dim, sizes["q_dim"])),
        layers=take(_layers(checkpoint, asked.layers)),
    )
    if not problems:
        take(_stream_of_heads(checkpoint, grown))
        if grown.sizes(sizes) == sizes and grown.layers == checkpoint.layers:
            take(ConfigError("nothing would grow: give factor, residual, ffn, heads, kv_heads, head_dim or layers"))
    if problems:
        raise ConfigError.from_problems(problems, where="hyperclone")
    return grown


def _whole(name: str, value: float, size: int) -> int | ConfigError:
    """``value`` as a factor of at least 1, or why it is none."""
    if value < 1:
        return ConfigError(f"{name} is {value:g}: a hyperclone only grows, and subclone makes models smaller")
    if value == int(value):
        return int(value)
    low = int(value)
    return ConfigError(
        f"{name} is {value:g}, and must be whole: {WHOLE.get(name, WHOLE['residual'])}; try {name}={low} "
        f"({size} {'stays' if low == 1 else f'becomes {low * size}'}) or {name}={low + 1} ({(low + 1) * size})"
    )


def _neurons(value: float, neurons: int) -> int | ConfigError:
    """Neurons that the FFN grows to: a factor, or from the present number on a number."""
    if value < 1:
        return ConfigError(f"ffn is {value:g}: a hyperclone only grows, and subclone makes models smaller")
    return round(value if value >= neurons else value * neurons)


def _layers(checkpoint: Checkpoint, layers: int | None) -> int | ConfigError:
    count, by_number = checkpoint.layers, checkpoint.family.layer_scale
    if layers is None or layers == count:
        return count
    if layers < count:
        return ConfigError(f"layers is {layers}, and the source has {count}: subclone makes models smaller")
    if by_number is not None and checkpoint.family.setting(checkpoint.config, by_number):
        return ConfigError(f"layers must stay {count}: with {by_number} a layer depends on its number")
    return layers


def _kv_heads(checkpoint: Checkpoint, wanted: str, heads: int) -> int | ConfigError:
    """How often each key and value head comes, or why that cannot be."""
    if "kv_head" not in checkpoint.sizes:
        if wanted in ("auto", "scale", str(heads)):
            return heads
        return ConfigError(
            f"kv_heads is {wanted}, but {checkpoint.family.model_type} has no grouped queries: keys and values come "
            "with each query head; leave kv_heads out"
        )
    kv, group = checkpoint.sizes["kv_head"], checkpoint.sizes["q_head"] // checkpoint.sizes["kv_head"]
    if wanted in ("auto", "scale", "same"):
        return 1 if wanted == "same" or (wanted == "auto" and kv == 1) else heads
    try:
        value = float(wanted)
    except ValueError:
        return ConfigError(f"kv_heads is {wanted!r}; it must be auto, scale, same or a whole number")
    factor = _whole("kv_heads", value, kv)
    if isinstance(factor, ConfigError) or shares_evenly(group, heads, factor):
        return factor
    fitting = [f for f in range(1, heads * group + 1) if shares_evenly(group, heads, f)]
    near = sorted(sorted(fitting, key=lambda f: abs(f - factor))[:3])
    return ConfigError(
        f"kv_heads is {factor}: {kv * factor} key and value heads cannot share {kv * group * heads} query heads so "
        f"that each reads a copy of what it read; try kv_heads={' or '.join(map(str, near))}"
    )


def shares_evenly(group: int, heads: int, kv_heads: int) -> bool:
    """Whether ``heads`` copies of a group of query heads divide evenly among ``kv_heads`` copies of what they read."""
    return group % (kv_heads // gcd(heads, kv_heads)) == 0


def _stream_of_heads(checkpoint: Checkpoint, grown: Growth) -> ConfigError | None:
    """Why heads cannot grow so, where they make up the residual stream."""
    size = checkpoint.family.sizes["q_dim"]
    if size.field is not None or grown.heads * grown.head_dim == grown.residual:
        return None
    factor = grown.residual if grown.residual > 1 else grown.heads * grown.head_dim
    pairs = [(f, factor // f) for f in range(factor, 0, -1) if factor % f == 0]
    choices = " or ".join(
        f"residual={factor} heads={heads}" + (f" head_dim={dim}" if dim > 1 else "") for heads, dim in pairs
    )
    return ConfigError(
        f"in {checkpoint.family.model_type} the heads make up the residual stream, so heads x head_dim must grow as it "
        f"does, and not {grown.heads} x {grown.head_dim} beside {grown.residual}; try {choices}"
    )


def grown_config(checkpoint: Checkpoint, grown: Growth, layers: Sequence[int]) -> dict[str, Any]:
    """Content of the result's ``config.json``.

    Args:
        checkpoint: The source.
        grown: What it becomes.
        layers: Old decoder layer of every new one.

    Raises:
        ConfigError: transformers accepts no config of these sizes; names the nearest that it does.
    """
    config = _config(checkpoint, grown, layers)
    if isinstance(config, dict):
        return config
    near = sorted(_others(checkpoint, grown), key=lambda other: _distance(other, grown))
    fitting = [other for other in near if isinstance(_config(checkpoint, other, layers), dict)]
    raise ConfigError(
        f"no {checkpoint.family.model_type} model has these sizes: {config}",
        where="hyperclone",
        hint=" or ".join(f"residual={other.residual} heads={other.heads}" for other in fitting[:3]) or None,
    )


def _config(checkpoint: Checkpoint, grown: Growth, layers: Sequence[int]) -> dict[str, Any] | str:
    """Content of the result's ``config.json``, or why there is none."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = checkpoint.family.resized(checkpoint.config, grown.sizes(checkpoint.sizes), layers)
        AutoConfig.for_model(**config)
    except CheckpointError as error:
        return error.what
    except (StrictDataclassError, ValueError) as error:
        return str(error.__cause__ or error)
    return config


def _others(checkpoint: Checkpoint, grown: Growth) -> Iterator[Growth]:
    """The same with other factors of the residual stream and of the heads."""
    sizes = checkpoint.sizes
    group = sizes["q_head"] // sizes.get("kv_head", sizes["q_head"])
    for residual in range(1, grown.residual + 3):
        for heads in range(1, grown.heads + 3):
            kv_heads = heads if grown.kv_heads == grown.heads else grown.kv_heads
            if shares_evenly(group, heads, kv_heads):
                yield replace(grown, residual=residual, heads=heads, kv_heads=kv_heads)


def _distance(other: Growth, wanted: Growth) -> tuple[int, int]:
    """Sorts what is near ``wanted`` first, the larger of two before the smaller."""
    return abs(other.residual - wanted.residual) + abs(other.heads - wanted.heads), -other.residual * other.heads


def head_copies(heads: int, kv_heads: int, grow: int, grow_kv: int) -> tuple[Tensor, Tensor]:
    """Old query heads and old key and value heads, in their new order: each new head reads a copy of what it read.

    The whole arrangement comes in as many blocks as both factors share; within a block every group's query heads come
    as often as is left, and so does its key and value head.

    Args:
        heads: Query heads H of the source.
        kv_heads: Key and value heads K of the source.
        grow: How often each query head comes.
        grow_kv: How often each key and value head comes.

    Returns:
        Old positions (H * grow,) and (K * grow_kv,) int64.
    """
    blocks = gcd(grow, grow_kv)
    groups = torch.arange(heads).view(kv_heads, 1, heads // kv_heads)
    queries = groups.expand(-1, grow // blocks, -1).flatten()
    return queries.repeat(blocks), torch.arange(kv_heads).repeat_interleave(grow_kv // blocks).repeat(blocks)


def spread(old: int, new: int) -> Tensor:
    """Old position (new,) of every new one: copies lie side by side, and as many come from each as can be."""
    return torch.arange(new) * old // new
