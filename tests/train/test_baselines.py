"""Recipes that `nested` is compared with do what they say, on a tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tiny_run import convert, documents_file, tiny_config

from dynaconv.config import RunConfig
from dynaconv.dynamic.modeling import load
from dynaconv.recipes import compose

Maker = Callable[..., Path]


def tiny(recipe: str, source: Path, text: Path) -> RunConfig:
    """The recipe's fine-tuning with a tiny run's sizes."""
    config, whole = tiny_config(source, text), compose(recipe)
    small = config.finetune
    sizes = {name: getattr(small, name) for name in ("tokens", "batch_size", "warmup_steps", "save_every", "wandb")}
    config.finetune = replace(whole.finetune, **sizes)
    config.calibrate.budgets = [0.5] if recipe == "static-half" else config.calibrate.budgets
    return config


def test_static_half_trains_one_width_and_is_measured_there(
    tiny_checkpoint: Maker, tmp_path: Path, text_file: Path
) -> None:
    config = tiny("static-half", tiny_checkpoint(ffn=128), documents_file(tmp_path, text_file))
    _, carve, finetune, calibrate, *_ = convert(config, tmp_path / "run", until="calibrate")
    before, after = load(carve.folder), load(finetune.folder)
    for old, new in zip(before.ffns(), after.ffns(), strict=True):
        assert torch.equal(new.up_proj.weight[64:], old.up_proj.weight[64:]), "the other half is left alone"
        assert not torch.equal(new.up_proj.weight[:64], old.up_proj.weight[:64])
    lines = [json.loads(line) for line in (finetune.folder / "metrics.jsonl").read_text().splitlines()]
    assert all({"loss_dial", "kl_dial"} <= set(line) and "loss_full" not in line for line in lines)
    assert {line["share_spent"] for line in lines} == {0.5}
    assert {"loss_dial", "kl_dial", "tokens_per_s"} <= set(finetune.record.metrics)
    points = json.loads((calibrate.folder / "frontier.json").read_text())
    assert [point["budget"] for point in points["frontier"]] == [0.5, 1.0]


def test_baselines_differ_from_the_default_in_the_router_only() -> None:
    for recipe, router in (("nested-uniform", "uniform"), ("nested-difficulty", "class"), ("nested-curve", "curve")):
        tuning = compose(recipe).finetune
        nested = compose("nested").finetune
        share = tuning.uniform_share if router == "uniform" else nested.uniform_share
        assert tuning == replace(nested, router=router, uniform_share=share)
    routed, nested = compose("routed"), compose("nested")
    units = ("router_learning_rate", "temperature", "uniform_share")  # scores are in other units
    assert nested.finetune == replace(routed.finetune, **{name: getattr(nested.finetune, name) for name in units})
