"""DeepSpeed's settings as the recipe's say them, with those of a file that adds to them. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dynaconv.config import RunConfig
from dynaconv.errors import ConfigError

OURS_ALONE = {  # sections that would replace what the recipe says, and what says it instead
    "optimizer": "finetune.learning_rate and finetune.weight_decay",
    "scheduler": "finetune.warmup_steps",
    "fp16": "finetune.precision",
    "bf16": "finetune.precision",
    "amp": "finetune.precision",
    "data_efficiency": "the section data",
    "curriculum_learning": "the section finetune",
}
# How many gradients are sent together. DeepSpeed's own 5e8 is a buffer of 2 GB in fp32, which a small model would fill
# with a second copy of all its gradients; 40 MB are still more than torch's own DDP sends at once.
BUCKET = 10**7
FLAT = 5 * 10**8  # the same at stage 0, where DeepSpeed takes no other
NEVER = 10**12
PASSES = 4


def deepspeed_config(config: RunConfig, world: int) -> dict[str, Any]:
    """Everything that DeepSpeed is told, the file named by ``engine.deepspeed_config`` included.

    Raises:
        ConfigError: The file cannot be read, or contradicts the recipe; lists every contradiction.
    """
    ours, defaults = _ours(config, world), {"zero_optimization": {"reduce_bucket_size": BUCKET}}
    # A step calls backward several times for each micro-batch: what DeepSpeed is told only has to be more than one.
    counted = {"gradient_accumulation_steps": PASSES * config.finetune.accumulation}
    counted["train_batch_size"] = PASSES * config.finetune.batch_size
    if config.engine.deepspeed_config is None:
        return _merged(defaults, ours) | counted
    path = Path(config.engine.deepspeed_config).expanduser()
    theirs = _read(path)
    wrong = list(_contradictions(ours, theirs))
    if wrong:
        raise ConfigError.from_problems(wrong, where=path)
    return _merged(_merged(defaults, theirs), ours) | counted


def _ours(config: RunConfig, world: int) -> dict[str, Any]:
    tuning, engine = config.finetune, config.engine
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if engine.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_batch_size": tuning.batch_size,
        "train_micro_batch_size_per_gpu": tuning.batch_size // (tuning.accumulation * world),
        "gradient_accumulation_steps": tuning.accumulation,
        "gradient_clipping": tuning.clip,
        "steps_per_print": NEVER,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Weights and what is sent between ranks stay fp32: routers compute in fp32 whatever surrounds them.
        "torch_autocast": {
            "enabled": tuning.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "zero_optimization": zero,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError("engine.deepspeed_config cannot be read", where=path, found=error) from error
    if not isinstance(content, dict):
        raise ConfigError("engine.deepspeed_config must hold an object", where=path, found=type(content).__name__)
    return {key: value for key, value in content.items() if value != "auto"}


def _contradictions(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """A sentence for each setting that the recipe has another value for."""
    for key, value in theirs.items():
        name = f"{prefix}{key}"
        if not prefix and key in OURS_ALONE:
            if not (isinstance(value, Mapping) and value.get("enabled") is False):
                yield f"{name} is set in the DeepSpeed file; leave it out and set {OURS_ALONE[key]} in the recipe"
        elif key in ours and isinstance(value, Mapping) and isinstance(ours[key], Mapping):
            yield from _contradictions(ours[key], value, f"{name}.")
        elif key in ours and value not in (ours[key], "auto"):
            yield f"{name} is {value!r} in the DeepSpeed file and {ours[key]!r} by the recipe"
        elif prefix == "zero_optimization." and key in ("offload_optimizer", "offload_param") and _offloads(value):
            field = {"offload_optimizer": "offload_optimizer", "offload_param": "offload_parameters"}[key]
            yield f"{name} is set in the DeepSpeed file, and engine.{field} is false in the recipe"


def _offloads(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("device", "none") != "none"


def _merged(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Both, ours over theirs."""
    both = dict(theirs)
    for key, value in ours.items():
        nested = isinstance(value, Mapping) and isinstance(both.get(key), Mapping)
        both[key] = _merged(both[key], value) if nested else value
    return both
