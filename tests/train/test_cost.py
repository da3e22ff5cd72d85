"""What fine-tuning is said to take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.config import LossConfig, LossesConfig, RunConfig
from dynaconv.train.cost import finetune_estimate, passes

Maker = Callable[..., Path]
DENSE = LossesConfig(full=LossConfig(1.0), distill=LossConfig(0.0), distill_full=LossConfig(0.0))
SELF_TAUGHT = {"teacher": "self", "losses": LossesConfig(distill_full=LossConfig(0.0))}


def estimate(checkpoint: Checkpoint, **changes: Any) -> tuple[int, float]:
    config = RunConfig()
    config.finetune = replace(config.finetune, **changes)
    found = finetune_estimate(config, checkpoint)
    return found.peak_bytes, found.flops


def test_passes_are_told_against_dense_training() -> None:
    tuning = RunConfig().finetune
    assert passes(replace(tuning, router="uniform", losses=DENSE)).dense == 1.0
    assert passes(tuning).dense == pytest.approx(7 / 3)
    assert str(passes(tuning)) == "2 forward and 2 backward passes, 1 forward of the parent"
    tuning = replace(tuning, **SELF_TAUGHT)
    assert passes(tuning).dense == 2.0
    assert passes(replace(tuning, gradient_checkpointing=True)).dense == pytest.approx(8 / 3)
    assert passes(replace(tuning, full_share=0.5)).dense == 1.5


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
