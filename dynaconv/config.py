"""Typed recipe: what a user may set, with defaults, and every check that needs no checkpoint.

A recipe YAML under ``recipes/`` is composed with hydra, merged into :class:`RunConfig`, and checked as a whole:
:func:`problems` returns every mistake, not the first. Importing this file imports neither torch nor hydra.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, is_dataclass
from itertools import pairwise
from typing import Any


@dataclass
class DataConfig:
    """Text for calibration, training and validation.

    Attributes:
        train: A file, glob or folder of text, a ``.jsonl`` file, the name of a Hugging Face dataset, or
            ``python-stdlib`` (the standard library's own source on this machine). A list mixes several.
        validation: The same, for text that is never trained on. ``None`` holds documents of ``train`` out.
        validation_share: Share of documents held out, by hash of their content, when ``validation`` is ``None``.
        exclude: Glob patterns; matching files are left out of ``train`` and ``validation``.
        field: Text field of jsonl records and datasets.
        dataset_config: Configuration name of a Hugging Face dataset.
        dataset_split: Split of a Hugging Face dataset that ``train`` is read from.
        sequence_length: Tokens in a window.
        pack: Cut one stream of documents into full windows. ``False`` keeps one document a window, padded.
    """

    train: list[str] = field(default_factory=lambda: ["python-stdlib"])
    validation: list[str] | None = None
    validation_share: float = 0.05
    exclude: list[str] = field(default_factory=list)
    field: str = "text"
    dataset_config: str | None = None
    dataset_split: str = "train"
    sequence_length: int = 256
    pack: bool = True


@dataclass
class ProfileConfig:
    """How much text is run through the parent, and what is gathered for a training-free router.

    Attributes:
        tokens: Calibration tokens.
        batch_size: Windows in a batch.
        curve_share: Share of the calibration tokens on which difficulty curves are measured.
        order: Which neurons come first: ``importance`` (mean |activation| times the norm of the down column) or
            ``none`` (as they are).
        loss_aware: Weigh curves by the gradient of the loss (needs the whole model and a backward pass in memory).
    """

    tokens: int = 65536
    batch_size: int = 16
    curve_share: float = 0.25
    order: str = "importance"
    loss_aware: bool = False


@dataclass
class CarveConfig:
    """Cut in the order that profile found, and routers without training.

    Attributes:
        router: ``curve`` (ridge regression of the difficulty curve on the FFN input).
        ridge: Ridge strength relative to the mean of the feature covariance's diagonal.
        shard_bytes: Largest shard that is written.
    """

    router: str = "curve"
    ridge: float = 1e-3
    shard_bytes: int = 4 * 1024**3


@dataclass
class FinetuneConfig:
    """Weights and routers at sampled budgets.

    Attributes:
        tokens: Training tokens.
        batch_size: Windows in one optimiser step.
        accumulation: Micro-batches a step is cut into.
        router: Target of the routers: ``gate`` (end to end), ``curve``, ``class``, or ``uniform`` (no router).
        teacher: ``self`` (the model's own full dial) or ``parent`` (the frozen dense checkpoint).
        learning_rate: Peak for the weights.
        router_learning_rate: Peak for the routers.
        warmup_steps: Linear warm-up; cosine decay to zero follows.
        weight_decay: Decoupled weight decay on weight matrices.
        clip: Largest gradient norm, of the weights and of the routers each.
        uniform_share: Share of the steps, at the start, in which all tokens get the same width.
        budgets: Lowest and highest budget sampled.
        full_weight: Weight of the full dial's cross-entropy; the dial's distillation has the rest. With ``uniform``,
            1 is plain dense training.
        router_rank: Hidden width of a router; ``0`` takes D / 16 rounded up to a multiple of 64.
        bound: Largest say of a ``gate`` router, in blocks to either side of the common level.
        temperature: Width of the straight-through sigmoid, in blocks.
        theta: Agreement (cosine) a ``class`` label asks for.
        precision: ``fp32`` or ``bf16``.
        gradient_checkpointing: Recompute activations in the backward pass.
        save_every: Steps between resumable states.
        wandb: ``auto`` (online with a key, offline without), ``offline`` or ``off``.
    """

    tokens: int = 1_500_000
    batch_size: int = 16
    accumulation: int = 1
    router: str = "gate"
    teacher: str = "self"
    learning_rate: float = 6e-4
    router_learning_rate: float = 1e-3
    warmup_steps: int = 20
    weight_decay: float = 0.0
    clip: float = 1.0
    uniform_share: float = 0.4
    budgets: list[float] = field(default_factory=lambda: [0.15, 0.75])
    full_weight: float = 0.5
    router_rank: int = 0
    bound: float = 3.0
    temperature: float = 1.0
    theta: float = 0.8
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    save_every: int = 50
    wandb: str = "auto"


@dataclass
class CalibrateConfig:
    """The dial's grid and how it is measured.

    Attributes:
        budgets: Active FFN shares to solve thresholds for; 1 is always added.
        tokens: Validation tokens that thresholds are solved on; never those that are scored.
        score_tokens: Validation tokens that loss and agreement are scored on.
        batch_size: Windows in a batch.
        tolerance: Largest difference between the share asked and the share spent.
        speed_tokens: Tokens generated at batch 1 for tokens/s; ``0`` leaves speed out.
    """

    budgets: list[float] = field(default_factory=lambda: [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875])
    tokens: int = 32768
    score_tokens: int = 40960
    batch_size: int = 16
    tolerance: float = 0.005
    speed_tokens: int = 64


@dataclass
class ExportConfig:
    """Where the result goes.

    Attributes:
        target: ``hf``: a folder that stock transformers loads, with the dial beside it.
        check: Reload the folder in a clean process and compare before publishing.
    """

    target: str = "hf"
    check: bool = True


@dataclass
class RunConfig:
    """Everything one run depends on.

    Attributes:
        source: Folder or hub name of the dense checkpoint.
        stages: Stages in order.
        blocks: Neuron blocks each FFN is cut into, at most 64.
        seed: Seeds sampling, shuffling and initialisation.
        trust_remote_code: Let transformers run code from the source folder.
    """

    source: str = ""
    stages: list[str] = field(default_factory=lambda: ["profile", "carve", "finetune", "calibrate", "export"])
    blocks: int = 8
    seed: int = 0
    trust_remote_code: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    carve: CarveConfig = field(default_factory=CarveConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


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
_TEXT = Allowed("not empty", lambda value: bool(value.strip()))
_SOURCES = Allowed("at least one file, folder or name", lambda value: value and all(item.strip() for item in value))

ALLOWED: dict[str, Allowed] = {
    "stages": Allowed(
        "at least one stage, none of them twice", lambda value: bool(value) and len(set(value)) == len(value)
    ),
    "blocks": _whole(1, 64),
    "seed": _whole(0),
    "data.train": _SOURCES,
    "data.validation": Allowed("null, or " + _SOURCES.words, lambda value: value is None or _SOURCES.holds(value)),
    "data.validation_share": _INNER_SHARE,
    "data.field": _TEXT,
    "data.dataset_split": _TEXT,
    "data.sequence_length": _whole(2),
    "profile.tokens": _whole(1),
    "profile.batch_size": _whole(1),
    "profile.curve_share": _POSITIVE_SHARE,
    "profile.order": _one_of("importance", "none"),
    "carve.router": _one_of("curve"),
    "carve.ridge": _POSITIVE,
    "carve.shard_bytes": _whole(1),
    "finetune.tokens": _whole(1),
    "finetune.batch_size": _whole(1),
    "finetune.accumulation": _whole(1),
    "finetune.router": _one_of("gate", "curve", "class", "uniform"),
    "finetune.teacher": _one_of("self", "parent"),
    "finetune.learning_rate": _POSITIVE,
    "finetune.router_learning_rate": _POSITIVE,
    "finetune.warmup_steps": _whole(0),
    "finetune.weight_decay": _NOT_NEGATIVE,
    "finetune.clip": _POSITIVE,
    "finetune.uniform_share": _SHARE,
    "finetune.budgets": Allowed(
        "a lowest and a highest budget, both above 0 and at most 1, such as [0.15, 0.75]",
        lambda value: len(value) == 2 and 0 < value[0] <= value[1] <= 1,
    ),
    "finetune.full_weight": _SHARE,
    "finetune.router_rank": _whole(0),
    "finetune.bound": _POSITIVE,
    "finetune.temperature": _POSITIVE,
    "finetune.theta": _POSITIVE_SHARE,
    "finetune.precision": _one_of("fp32", "bf16"),
    "finetune.save_every": _whole(1),
    "finetune.wandb": _one_of("auto", "offline", "off"),
    "calibrate.budgets": Allowed("ascending budgets, each above 0 and at most 1, such as [0.25, 0.5]", _ascending),
    "calibrate.tokens": _whole(1),
    "calibrate.score_tokens": _whole(1),
    "calibrate.batch_size": _whole(1),
    "calibrate.tolerance": _INNER_SHARE,
    "calibrate.speed_tokens": _whole(0),
    "export.target": _one_of("hf"),
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
    return [*wrong.values(), *between]


def _problems_between(config: RunConfig, wrong: Collection[str]) -> Iterator[str]:
    """Mistakes in how fields of the stages that run go together, leaving out fields ``wrong`` by themselves."""
    window, tune = config.data.sequence_length, config.finetune
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


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every field below ``section``, in the order of the schema."""
    for name in section.__dataclass_fields__:
        value = getattr(section, name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
