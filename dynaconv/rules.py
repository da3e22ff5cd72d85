"""What each field of a recipe may be, and every mistake that shows without a checkpoint."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from itertools import pairwise
from typing import Any

from dynaconv.config import LossesConfig, RunConfig
from dynaconv.errors import ConfigError


@dataclass(frozen=True)
class Allowed:
    """What one field may be.

    Attributes:
        words: Ends the sentence "FIELD is VALUE; it must be ...".
        holds: Whether a value is allowed.
        choices: The allowed words, where there are only a few.
    """

    words: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def _one_of(*choices: str) -> Allowed:
    return Allowed(f"one of {', '.join(choices)}", lambda value: value in choices, choices)


def _whole(low: int, high: int | None = None) -> Allowed:
    words = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
    return Allowed(words, lambda value: value >= low and (high is None or value <= high))


def _ascending(values: list[float]) -> bool:
    return bool(values) and values[0] > 0 and values[-1] <= 1 and all(a < b for a, b in pairwise(values))


_POSITIVE = Allowed("a finite number above 0", lambda value: math.isfinite(value) and value > 0)
_NOT_NEGATIVE = Allowed("a finite number of at least 0", lambda value: math.isfinite(value) and value >= 0)
_SHARE = Allowed("from 0 to 1", lambda value: 0 <= value <= 1)
_POSITIVE_SHARE = Allowed("above 0 and at most 1", lambda value: 0 < value <= 1)
_INNER_SHARE = Allowed("above 0 and below 1", lambda value: 0 < value < 1)
_FROM_ONE = Allowed("a finite number of at least 1", lambda value: math.isfinite(value) and value >= 1)
_TEXT = Allowed("not empty", lambda value: bool(value.strip()))
_WEIGHTS = Allowed("finite numbers above 0", lambda value: bool(value) and all(map(_POSITIVE.holds, value)))
_SOURCES = Allowed("at least one file, folder or name", lambda value: value and all(item.strip() for item in value))


def _or_null(allowed: Allowed) -> Allowed:
    return Allowed(f"null, or {allowed.words}", lambda value: value is None or allowed.holds(value), allowed.choices)


SUBCLONE_SIZES = ("residual", "ffn", "heads", "kv_heads", "head_dim", "layers")
_KV_HEADS = Allowed(
    "auto, scale, same, or a whole factor of at least 1",
    lambda value: value in ("auto", "scale", "same") or (value.isdecimal() and int(value) >= 1),
    ("auto", "scale", "same"),
)

ALLOWED: dict[str, Allowed] = {
    "stages": Allowed(
        "at least one stage, none of them twice", lambda value: bool(value) and len(set(value)) == len(value)
    ),
    "experts": _one_of("neurons", "routed", "nested"),
    "blocks": _or_null(_whole(1)),
    "block_size": _or_null(_whole(1)),
    "seed": _whole(0),
    "data.train": _SOURCES,
    "data.validation": _or_null(_SOURCES),
    "data.validation_share": _INNER_SHARE,
    "data.weights": _or_null(_WEIGHTS),
    "data.field": _TEXT,
    "data.chat": _or_null(_TEXT),
    "data.dataset_split": _TEXT,
    "data.sequence_length": _whole(2),
    "profile.tokens": _whole(1),
    "profile.batch_size": _whole(1),
    "profile.curve_share": _POSITIVE_SHARE,
    "profile.order": _one_of("importance", "none"),
    "importance.tokens": _whole(1),
    "importance.batch_size": _whole(1),
    "subclone.ratio": _or_null(_POSITIVE_SHARE),
    "subclone.params": _or_null(_FROM_ONE),
    **{f"subclone.{axis}": _or_null(_whole(1)) for axis in SUBCLONE_SIZES},
    "subclone.order": _one_of("importance", "none"),
    "subclone.refit_ridge": _POSITIVE,
    "subclone.shard_bytes": _whole(1),
    "hyperclone.factor": _FROM_ONE,
    "hyperclone.residual": _or_null(_FROM_ONE),
    "hyperclone.ffn": _or_null(_FROM_ONE),
    "hyperclone.heads": _or_null(_FROM_ONE),
    "hyperclone.kv_heads": _KV_HEADS,
    "hyperclone.head_dim": _FROM_ONE,
    "hyperclone.layers": _or_null(_whole(1)),
    "hyperclone.variant": _one_of("noisy", "symmetric", "diagonal"),
    "hyperclone.snr_db": Allowed("a finite number of decibels", math.isfinite),
    "hyperclone.shard_bytes": _whole(1),
    "sketch.coarse_bits": _whole(1, 8),
    "sketch.bits": _whole(1, 8),
    "sketch.reach": _NOT_NEGATIVE,
    "sketch.low_bits": _whole(1, 8),
    "sketch.group": _whole(1),
    "sketch.values": _one_of("mixed", "exact"),
    "carve.ridge": _POSITIVE,
    "carve.shard_bytes": _whole(1),
    "finetune.tokens": _whole(1),
    "finetune.batch_size": _whole(1),
    "finetune.accumulation": _whole(1),
    "finetune.trainable": _one_of("all", "ffn", "routers", "lora"),
    "finetune.lora_rank": _whole(1),
    "finetune.lora_alpha": _POSITIVE,
    **{f"finetune.losses.{name}.weight": _NOT_NEGATIVE for name in LossesConfig.__dataclass_fields__},
    **{f"finetune.losses.{name}.after": _SHARE for name in LossesConfig.__dataclass_fields__},
    **{f"finetune.losses.{name}.ramp": _SHARE for name in LossesConfig.__dataclass_fields__},
    "finetune.teacher": _one_of("self", "parent"),
    "finetune.learning_rate": _POSITIVE,
    "finetune.router_learning_rate": _POSITIVE,
    "finetune.warmup_steps": _whole(0),
    "finetune.weight_decay": _NOT_NEGATIVE,
    "finetune.betas": Allowed(
        "two numbers from 0 to less than 1, such as [0.9, 0.99]",
        lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
    ),
    "finetune.clip": _POSITIVE,
    "finetune.uniform_share": _SHARE,
    "finetune.budgets": _or_null(
        Allowed(
            "a lowest and a highest budget, both above 0 and at most 1, such as [0.15, 0.75]",
            lambda value: len(value) == 2 and 0 < value[0] <= value[1] <= 1,
        )
    ),
    "finetune.distribution": _one_of("uniform", "low", "high"),
    "finetune.anchor": _or_null(_POSITIVE_SHARE),
    "finetune.anchor_after": _SHARE,
    "finetune.full_share": _SHARE,
    "finetune.explosion": _POSITIVE,
    "finetune.router_rank": _or_null(_whole(0)),
    "finetune.bound": _or_null(_POSITIVE),
    "finetune.temperature": _POSITIVE,
    "finetune.theta": _POSITIVE_SHARE,
    "finetune.precision": _one_of("fp32", "bf16"),
    "finetune.save_every": _whole(1),
    "finetune.statistics_every": _whole(0),
    "finetune.wandb": _one_of("auto", "offline", "off"),
    "calibrate.budgets": _or_null(
        Allowed("ascending budgets, each above 0 and at most 1, such as [0.25, 0.5]", _ascending)
    ),
    "calibrate.tokens": _whole(1),
    "calibrate.score_tokens": _whole(1),
    "calibrate.batch_size": _whole(1),
    "calibrate.tolerance": _INNER_SHARE,
    "calibrate.speed_tokens": _whole(0),
    "export.target": _one_of("hf"),
    "engine.kind": _one_of("torch", "deepspeed"),
    "engine.nproc": _whole(1),
    "engine.zero_stage": _whole(0, 3),
}


def problems(config: RunConfig) -> list[str]:
    """Every mistake in ``config`` that shows without a checkpoint, one sentence each; empty when there is none."""
    wrong = {}
    for name, value in leaves(config):
        allowed = ALLOWED.get(name)
        if allowed is not None and not allowed.holds(value):
            near = difflib.get_close_matches(str(value), allowed.choices, n=1)
            wrong[name] = f"{name} is {value!r}; it must be {allowed.words}" + (f" ({near[0]!r}?)" if near else "")
    between = _problems_between(config, wrong) if "data.sequence_length" not in wrong else []
    return [*wrong.values(), *_block_problems(config), *between, *_engine_problems(config)]


def _block_problems(config: RunConfig) -> Iterator[str]:
    """A size where a number is meant, or the reverse; more bits read than there are."""
    sketch = config.sketch
    if not sketch.coarse_bits <= sketch.bits <= sketch.low_bits:
        yield (
            f"sketch.coarse_bits, sketch.bits and sketch.low_bits are {sketch.coarse_bits}, {sketch.bits} and "
            f"{sketch.low_bits}; each must be at most the next, whose high bits they are"
        )
    if config.experts == "neurons" and config.blocks is not None:
        yield f"blocks is {config.blocks}, but experts is 'neurons', which are chosen one by one: leave blocks out"
    if config.experts == "neurons" and config.block_size not in (None, 1):
        yield (
            f"block_size is {config.block_size}, but experts is 'neurons', which are chosen one by one: leave "
            "block_size out, or ask for blocks with experts=routed"
        )
    if config.experts == "routed" and config.blocks is not None:
        yield (
            f"blocks is {config.blocks}, but experts is 'routed', whose blocks are given by their size: leave blocks "
            "out (blocks=null) and say block_size, the neurons a block (neurons of an FFN / blocks gives as many)"
        )
    if config.experts == "nested" and config.block_size is not None:
        yield (
            f"block_size is {config.block_size}, but experts is 'nested', whose blocks are given by their number: "
            "leave block_size out (block_size=null) and say blocks, how many"
        )


def _engine_problems(config: RunConfig) -> Iterator[str]:
    """What of DeepSpeed is asked for and cannot be."""
    engine = config.engine
    asked = {
        "offload_optimizer": engine.offload_optimizer,
        "offload_parameters": engine.offload_parameters,
        "deepspeed_config": engine.deepspeed_config is not None,
    }
    if engine.kind == "torch":
        yield from (f"engine.{name} needs engine.kind=deepspeed" for name, wanted in asked.items() if wanted)
    elif engine.offload_optimizer and engine.zero_stage == 0:
        yield "engine.offload_optimizer needs engine.zero_stage of 1, 2 or 3"
    if engine.offload_parameters and not (engine.zero_stage == 3 and engine.offload_optimizer):
        yield "engine.offload_parameters needs engine.zero_stage=3 and engine.offload_optimizer=true"


def _problems_between(config: RunConfig, wrong: Collection[str]) -> Iterator[str]:
    """Mistakes in how fields of the stages that run go together, leaving out fields ``wrong`` by themselves."""
    window, tune = config.data.sequence_length, config.finetune
    weights, sources = config.data.weights, config.data.train
    if weights is not None and not {"data.weights", "data.train"} & set(wrong) and len(weights) != len(sources):
        yield f"data.weights has {len(weights)} numbers; it must have one for each of data.train ({len(sources)})"
    for name, tokens in (
        ("profile.tokens", config.profile.tokens),
        ("calibrate.tokens", config.calibrate.tokens),
        ("calibrate.score_tokens", config.calibrate.score_tokens),
    ):
        if name not in wrong and name.split(".")[0] in config.stages and tokens < window:
            yield f"{name} is {tokens}; it must be at least one window (data.sequence_length is {window})"
    sizes = {"finetune.tokens", "finetune.batch_size", "finetune.accumulation"}
    if "finetune" not in config.stages or sizes & set(wrong):
        return
    if tune.tokens < tune.batch_size * window:
        batch = f"{tune.batch_size} windows of {window} tokens, {tune.batch_size * window}"
        yield f"finetune.tokens is {tune.tokens}; it must be at least one batch ({batch})"
    if tune.batch_size % tune.accumulation:
        yield f"finetune.accumulation is {tune.accumulation}; it must divide finetune.batch_size ({tune.batch_size})"
    elif "engine.nproc" not in wrong and (unlike := uneven(config, config.engine.nproc)):
        yield f"engine.nproc: {unlike}"


def require_affordable(name: str, budgets: Sequence[float], routers: float) -> None:
    """Checks ascending ``budgets``, the recipe's field ``name``, against what ``routers`` read for every token.

    Raises:
        ConfigError: The lowest is below that share of the bytes of the FFNs.
    """
    if budgets and budgets[0] <= routers:
        raise ConfigError(
            f"{name} begins at {budgets[0]:g}, but the routers alone read {routers:.3f} of the bytes of the FFNs",
            expected=f"budgets above {routers:.3f}",
            hint=f"leave {name} out (null) for budgets that fit",
        )


def uneven(config: RunConfig, world: int) -> str | None:
    """What is wrong with ``world`` processes for the fine-tuning's batch; ``None`` where each gets as much of it."""
    tuning = config.finetune
    sequences = tuning.batch_size // tuning.accumulation
    if sequences % world == 0:
        return None
    smallest = world * tuning.accumulation
    parts = f"finetune: {tuning.batch_size} sequences in {tuning.accumulation} micro-batches"
    hint = f"finetune.batch_size={-(-tuning.batch_size // smallest) * smallest} would do"
    if sequences < world:
        return f"{world} processes, and a micro-batch of {sequences} sequences ({parts}): some get none; {hint}"
    return f"{world} processes do not divide a micro-batch of {sequences} sequences ({parts}); {hint}"


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every field below ``section``, in the order of the schema."""
    for name in section.__dataclass_fields__:
        value = getattr(section, name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
