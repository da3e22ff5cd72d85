"""What DeepSpeed is told, and what a file of further settings may not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynaconv.config import EngineConfig, FinetuneConfig, RunConfig
from dynaconv.errors import ConfigError
from dynaconv.rules import problems, uneven
from dynaconv.train.deepspeed_config import BUCKET, deepspeed_config
from dynaconv.train.stage import FinetuneStage


def config(path: Path | None = None, **engine: Any) -> RunConfig:
    tuning = FinetuneConfig(batch_size=16, accumulation=2, clip=0.5)
    settings = {"kind": "deepspeed", "zero_stage": 2, "deepspeed_config": None if path is None else str(path), **engine}
    stages = ["profile", "carve", "finetune", "calibrate", "export"]
    return RunConfig(stages=stages, finetune=tuning, engine=EngineConfig(**settings))


def test_the_recipe_decides() -> None:
    made = deepspeed_config(config(zero_stage=3, offload_optimizer=True, offload_parameters=True), 4)
    assert made["gradient_clipping"] == 0.5
    assert made["zero_optimization"]["stage"] == 3
    assert made["zero_optimization"]["reduce_bucket_size"] == BUCKET
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert made["zero_optimization"]["offload_param"] == {"device": "cpu"}
    counted = made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"] * 4
    assert made["train_batch_size"] == counted, "as DeepSpeed checks"
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["torch_autocast"]["enabled"] is False


def test_a_file_adds_what_the_recipe_leaves_open(tmp_path: Path) -> None:
    path = tmp_path / "more.json"
    more = {
        "train_batch_size": 16,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "none"}},
        "wall_clock_breakdown": True,
        "fp16": {"enabled": False},
    }
    path.write_text(json.dumps(more))
    made = deepspeed_config(config(path), 2)
    assert made["zero_optimization"]["reduce_bucket_size"] == 1000
    assert made["wall_clock_breakdown"] is True
    assert made["zero_optimization"]["stage"] == 2


def test_contradictions_are_all_named_at_once_and_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "wrong.json"
    wrong = {
        "train_batch_size": 32,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    }
    path.write_text(json.dumps(wrong))
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(config(path), 2)
    (seen,) = FinetuneStage().problems(config(path, nproc=2))
    for told in (str(caught.value), seen):
        for part in (
            "train_batch_size is 32 in the DeepSpeed file and 16 by the recipe",
            "gradient_clipping is 1.0",
            "optimizer is set in the DeepSpeed file; leave it out and set finetune.learning_rate",
            "bf16 is set",
            "zero_optimization.stage is 3",
            "zero_optimization.offload_optimizer is set",
            "6 mistakes",
            str(path),
        ):
            assert part in told, part


@pytest.mark.parametrize("text", ["[1]", "{", None])
def test_a_file_that_cannot_be_read(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "file.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"engine.deepspeed_config (.|\n)*file\.json"):
        deepspeed_config(config(path), 1)


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        ({"kind": "torch", "zero_stage": 1, "offload_optimizer": True}, "engine.offload_optimizer needs engine.kind"),
        ({"zero_stage": 0, "offload_optimizer": True}, "needs engine.zero_stage of 1, 2 or 3"),
        ({"zero_stage": 2, "offload_parameters": True}, "engine.offload_parameters needs engine.zero_stage=3"),
        ({"zero_stage": 4}, "engine.zero_stage is 4; it must be a whole number from 0 to 3"),
        ({"kind": "deepsped"}, "('deepspeed'?)"),
        ({"nproc": 0}, "engine.nproc is 0"),
        ({"nproc": 16}, "16 processes, and a micro-batch of 8 sequences"),
        ({"nproc": 3}, "3 processes do not divide a micro-batch of 8 sequences"),
    ],
)
def test_engines_that_cannot_be(engine: dict[str, Any], told: str) -> None:
    (problem,) = problems(config(**engine))
    assert told in problem


def test_every_process_gets_as_much() -> None:
    assert [world for world in range(1, 20) if uneven(config(), world) is None] == [1, 2, 4, 8]
