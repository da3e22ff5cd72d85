"""Statistics of routers against what can be counted by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dynamic_models import SELF_TAUGHT, dynamic_model, token_ids

from dynaconv.config import FinetuneConfig
from dynaconv.data.windows import Windows
from dynaconv.dynamic.recorder import Recorder
from dynaconv.ranks import Ranks
from dynaconv.train.engine import TorchEngine
from dynaconv.train.statistics import BINS, entropy, information, router_statistics, share_spent
from dynaconv.train.step import Trainer

Maker = Callable[..., Path]


def test_widths_are_summed_up_by_layer() -> None:
    widths = {0: torch.tensor([0, 2, 2, 4]), 1: torch.tensor([3, 3, 3, 3])}
    found = router_statistics(widths, torch.arange(4), torch.arange(4.0), blocks=4, accuracies={1: 0.75})
    assert found["layer0/width_mean"] == 2.0
    assert found["layer0/width_std"] == pytest.approx(math.sqrt(2))
    assert found["layer0/width_entropy"] == pytest.approx(1.5 * math.log(2))
    assert found["layer1/width_entropy"] == 0.0 == found["layer1/token_information"]
    assert found["layer1/label_accuracy"] == 0.75
    assert "layer0/label_accuracy" not in found


def test_information_is_the_entropy_where_one_says_all_and_nothing_where_it_says_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    first, other = (torch.randint(0, 5, (20000,), generator=generator) for _ in range(2))
    order = torch.randperm(20000, generator=generator)
    assert information(first, 4 - first, order).item() == pytest.approx(entropy(first.bincount()).item(), abs=0.01)
    assert information(first, other, order).item() == pytest.approx(0.0, abs=0.01)
    many = torch.randint(0, 5000, (20000,), generator=generator)
    assert information(first, many, order).item() == pytest.approx(0.0, abs=0.05), "few tokens of each do not count"


def test_difficulty_is_ranked() -> None:
    losses = torch.rand(8000, generator=torch.Generator().manual_seed(0)) ** 4
    wide = (losses.argsort().argsort() * BINS // len(losses)).clamp(max=3)
    found = router_statistics({0: wide}, torch.zeros(8000, dtype=torch.int64), losses, 4, {})
    assert found["layer0/difficulty_information"] == pytest.approx(found["layer0/width_entropy"], abs=0.01)
    assert found["layer0/token_information"] == 0.0


@pytest.mark.parametrize("router", ["width", "curve", "class"])
def test_training_measures_every_so_many_steps(tiny_checkpoint: Maker, router: str) -> None:
    config = FinetuneConfig(
        **SELF_TAUGHT, batch_size=4, router=router, uniform_share=0.25, statistics_every=3, accumulation=2
    )
    engine = TorchEngine(dynamic_model(tiny_checkpoint(), router), config, Ranks.single("cpu"))
    made = Trainer(engine, config, Windows(torch.arange(1, 60).repeat(30).int(), 16), steps=8, seed=3)
    measured, without = [], Trainer(engine, replace(config, statistics_every=0), made.windows, steps=8, seed=3)
    made.run(0, lambda step, found: measured.append("layer1/width_entropy" in found))
    assert measured == [False, False, False, True, False, False, True, False]
    found = made.step(3)
    assert 0.0 <= found["layer0/width_mean"] <= 4.0
    share = (found["layer0/width_mean"] + found["layer1/width_mean"]) / 8
    assert share == pytest.approx(found["share_spent"], abs=0.1)
    assert ("layer0/label_accuracy" in found) == (router != "width")
    assert not [name for name in without.step(3) if name.startswith("layer")]


def test_the_share_spent_counts_neurons_and_the_router(tiny_checkpoint: Maker) -> None:
    model = dynamic_model(tiny_checkpoint(ffn=67))
    recorder, edges = Recorder(), model.layout.partition.edges
    with torch.no_grad(), model.call.using(model.policy(0.5), recorder):
        model(token_ids())
    widths, cost = [found[0] for found in recorder.widths.values()], model.ffns()[0].cost.bytes
    assert 0.0 < cost.fixed < 0.1 and cost.exact == 1.0
    expected = sum(edges[int(w)] for found in widths for w in found.flatten()) / edges[-1] / (2 * 24)
    assert 0.1 < share_spent(recorder, None) == pytest.approx(cost.fixed + expected)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 4:] = False
    expected = sum(edges[int(w)] for found in widths for w in found[mask]) / edges[-1] / (2 * 16)
    assert share_spent(recorder, mask) == pytest.approx(cost.fixed + expected), "padding spends nothing"
