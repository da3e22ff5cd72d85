"""The schema's own checks: defaults pass, every mistake is said, all of them at once."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dynaconv.config import RunConfig
from dynaconv.rules import ALLOWED, leaves, problems

WRONG: dict[str, list[Any]] = {
    "stages": [[], ["profile", "profile"]],
    "experts": ["dense"],
    "blocks": [0, -1],
    "block_size": [0, -1],
    "seed": [-1],
    "data.train": [[], [""], ["a", " "]],
    "data.validation": [[]],
    "data.validation_share": [0.0, 1.0, math.nan],
    "data.field": [""],
    "data.sequence_length": [0, 1],
    "profile.tokens": [0],
    "profile.batch_size": [0],
    "profile.curve_share": [0.0, 1.1],
    "profile.order": ["random"],
    "sketch.coarse_bits": [0, 9],
    "sketch.bits": [0, 9],
    "sketch.low_bits": [0, 9],
    "sketch.group": [0],
    "sketch.reach": [-0.1, math.nan, math.inf],
    "sketch.values": ["low"],
    "carve.ridge": [0.0, math.inf],
    "finetune.tokens": [0],
    "finetune.batch_size": [0],
    "finetune.accumulation": [0],
    "finetune.teacher": ["mother"],
    "finetune.learning_rate": [0.0, -1.0, math.nan],
    "finetune.router_learning_rate": [-1e-3],
    "finetune.warmup_steps": [-1],
    "finetune.weight_decay": [-0.1],
    "finetune.clip": [0.0],
    "finetune.uniform_share": [-0.1, 1.1],
    "finetune.budgets": [[0.5], [0.0, 0.5], [0.6, 0.5], [0.5, 1.5], [0.1, 0.2, 0.3]],
    "finetune.betas": [[0.9], [0.9, 1.0], [-0.1, 0.9], [0.9, 0.99, 0.999]],
    "finetune.trainable": ["head"],
    "finetune.lora_rank": [0],
    "finetune.lora_alpha": [0.0],
    "finetune.losses.full.weight": [-1.0, math.nan],
    "finetune.losses.distill.after": [1.5],
    "finetune.losses.consistency.ramp": [-0.1],
    "finetune.explosion": [0.0],
    "finetune.full_share": [-0.1, 1.1],
    "finetune.distribution": ["normal"],
    "finetune.anchor": [0.0, 1.5],
    "finetune.anchor_after": [2.0],
    "finetune.statistics_every": [-1],
    "finetune.router_rank": [-1],
    "finetune.bound": [0.0, -1.0],
    "finetune.theta": [0.0],
    "finetune.precision": ["fp16"],
    "finetune.save_every": [0],
    "finetune.wandb": ["on"],
    "calibrate.budgets": [[], [0.0], [0.5, 0.25], [0.5, 0.5], [1.5], [math.nan]],
    "calibrate.tokens": [0],
    "calibrate.tolerance": [0.0],
    "calibrate.speed_tokens": [-1],
    "export.target": ["gguf"],
}


def put(config: RunConfig, name: str, value: Any) -> None:
    *sections, last = name.split(".")
    target: Any = config
    for section in sections:
        target = getattr(target, section)
    setattr(target, last, value)


def test_defaults_are_right() -> None:
    assert problems(RunConfig()) == []


def test_every_rule_is_about_a_field() -> None:
    assert set(ALLOWED) <= {name for name, _ in leaves(RunConfig())}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]])
def test_a_wrong_value_is_named_with_what_is_allowed(name: str, value: Any) -> None:
    config = RunConfig()
    put(config, name, value)
    (sentence, *_) = [found for found in problems(config) if found.startswith(f"{name} is ")]
    assert repr(value) in sentence
    assert ALLOWED[name].words in sentence


def test_a_router_may_be_left_to_its_defaults() -> None:
    config = RunConfig()
    assert (config.finetune.router_rank, config.finetune.bound) == (None, None)
    config.finetune.router_rank, config.finetune.bound = 0, 2.5
    assert problems(config) == []


def test_a_near_miss_is_suggested() -> None:
    config = RunConfig()
    config.finetune.precision = "bf-16"
    assert problems(config) == ["finetune.precision is 'bf-16'; it must be one of fp32, bf16 ('bf16'?)"]


def test_all_mistakes_at_once() -> None:
    config = RunConfig()
    for name, values in WRONG.items():
        put(config, name, values[0])
    found = problems(config)
    for name in WRONG:
        assert any(sentence.startswith(f"{name} is ") for sentence in found), name


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"finetune.batch_size": 16, "finetune.accumulation": 3}, "finetune.accumulation"),
        ({"finetune.tokens": 100}, "finetune.tokens"),
        ({"profile.tokens": 100}, "profile.tokens"),
        ({"calibrate.tokens": 100}, "calibrate.tokens"),
        ({"calibrate.score_tokens": 100}, "calibrate.score_tokens"),
    ],
)
def test_fields_that_do_not_go_together(changes: dict[str, Any], named: str) -> None:
    config = RunConfig(stages=["profile", "carve", "finetune", "calibrate", "export"], experts="nested")
    for name, value in changes.items():
        put(config, name, value)
    (sentence,) = problems(config)
    assert sentence.startswith(f"{named} is ")


@pytest.mark.parametrize(
    ("bits", "right"),
    [((2, 3, 4), True), ((3, 3, 3), True), ((1, 8, 8), True), ((4, 3, 4), False), ((2, 5, 4), False)],
)
def test_a_sketch_reads_no_more_bits_than_there_are(bits: tuple[int, int, int], right: bool) -> None:
    config = RunConfig()
    for name, value in zip(("coarse_bits", "bits", "low_bits"), bits, strict=True):
        put(config, f"sketch.{name}", value)
    found = problems(config)
    assert (found == []) is right
    assert right or found[0].startswith(
        "sketch.coarse_bits, sketch.bits and sketch.low_bits are {}, {} and {}".format(*bits)
    )


@pytest.mark.parametrize(
    ("experts", "changes", "named"),
    [
        ("neurons", {"blocks": 8}, "blocks is 8"),
        ("neurons", {"block_size": 16}, "block_size is 16"),
        ("neurons", {"block_size": 1}, None),
        ("routed", {"blocks": 8}, "blocks is 8"),
        ("routed", {"block_size": 1}, None),
        ("nested", {"block_size": 16}, "block_size is 16"),
        ("nested", {"blocks": 8}, None),
    ],
)
def test_blocks_are_said_as_the_experts_have_them(experts: str, changes: dict[str, int], named: str | None) -> None:
    found = problems(RunConfig(experts=experts, **changes))
    assert [sentence.partition(",")[0] for sentence in found] == ([] if named is None else [named])


def test_stages_that_do_not_run_are_not_compared() -> None:
    config = RunConfig(stages=["profile", "carve", "calibrate", "export"])
    config.finetune.tokens = 100
    assert problems(config) == []
    config.finetune.wandb = "on"
    assert len(problems(config)) == 1, "a value that is never allowed is wrong all the same"
