"""What fine-tuning is said to take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.config import LossConfig, LossesConfig, RunConfig
from dynaconv.convert.resize_stage import SubcloneStage
from dynaconv.pipeline.plan import make_plan
from dynaconv.pipeline.registry import load as load_stage
from dynaconv.recipes import compose
from dynaconv.train.estimate import finetune_estimate, pass_count

Maker = Callable[..., Path]
DENSE = LossesConfig(full=LossConfig(1.0), distill=LossConfig(0.0), distill_full=LossConfig(0.0))
SELF_TAUGHT = {"teacher": "self", "losses": LossesConfig(distill_full=LossConfig(0.0))}


def estimate(checkpoint: Checkpoint, parent: Checkpoint | None = None, **changes: Any) -> tuple[int, float]:
    config = RunConfig()
    config.finetune = replace(config.finetune, **changes)
    found = finetune_estimate(config, checkpoint, parent or checkpoint)
    return found.peak_bytes, found.flops


def test_passes_are_told_against_dense_training() -> None:
    tuning = RunConfig().finetune
    assert pass_count(replace(tuning, router="uniform", losses=DENSE)).dense == 1.0
    assert pass_count(tuning).dense == pytest.approx(7 / 3)
    assert str(pass_count(tuning)) == "2 forward and 2 backward passes, 1 forward of the parent"
    tuning = replace(tuning, **SELF_TAUGHT)
    assert pass_count(tuning).dense == 2.0
    assert pass_count(replace(tuning, gradient_checkpointing=True)).dense == pytest.approx(8 / 3)
    assert pass_count(replace(tuning, full_share=0.5)).dense == 1.5


def test_a_parent_of_another_size_is_told_by_its_own(tiny_checkpoint: Maker) -> None:
    """After subclone and hyperclone, what teaches is the source that the run began with."""
    small, large = (Checkpoint.open(tiny_checkpoint(ffn=neurons)) for neurons in (64, 256))
    tokens = RunConfig().finetune.tokens
    (memory, flops), (more, work) = estimate(small), estimate(small, large)
    assert more - memory == large.reader.total_bytes - small.reader.total_bytes > 0
    assert work - flops == pytest.approx(2.0 * (large.parameters - small.parameters) * tokens)
    assert estimate(small, large, **SELF_TAUGHT) == estimate(small, **SELF_TAUGHT), "no parent is held"


def test_cheaper_settings_are_said_to_be_cheaper(tiny_checkpoint: Maker) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(layers=6))
    memory, flops = estimate(checkpoint)
    for changes in (
        {"accumulation": 2},
        {"gradient_checkpointing": True},
        {"trainable": "ffn"},
        {"trainable": "routers"},
        {"router": "uniform", "losses": DENSE},
    ):
        assert estimate(checkpoint, **changes)[0] < memory, changes
    assert flops == pytest.approx(14.0 * checkpoint.parameters * RunConfig().finetune.tokens)
    alone, cheaper = estimate(checkpoint, **SELF_TAUGHT)
    assert memory > alone + 4 * checkpoint.parameters, "and what the parent says of the batch"
    assert cheaper == 12.0 * checkpoint.parameters * RunConfig().finetune.tokens
    assert estimate(checkpoint, router="uniform", losses=DENSE, teacher="self")[1] == cheaper / 2


def test_a_plan_knows_the_parent_from_what_was_made_of_it(tiny_checkpoint: Maker) -> None:
    folder = tiny_checkpoint(heads=8, kv_heads=4)
    config = compose("subclone-then-nested", ["subclone.ratio=0.5"])
    made = SubcloneStage().resized(config, folder)
    assert isinstance(made, Checkpoint)
    parent, stages = Checkpoint.open(folder), make_plan(config, None, folder).stages
    told = {stage.name: stage.estimate.peak_bytes for stage in stages}
    alone = {name: load_stage(name).estimate(config, made).peak_bytes for name in told}
    more = parent.reader.total_bytes - made.reader.total_bytes
    assert more > 0
    changed = {name: told[name] - alone[name] for name in ("carve", "finetune", "calibrate", "export")}
    assert changed == {"carve": 0, "finetune": more, "calibrate": more, "export": 0}
