"""Thresholds meet their budgets while gated, and the table they make is monotone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from dynamic_models import dynamic_model, token_ids

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.calibrate.solve import solve_budget
from dynaconv.calibrate.sweep import Text, measure, thresholds_for, uniform_table
from dynaconv.config import CalibrateConfig
from dynaconv.data.windows import Batch
from dynaconv.dynamic.policy import at_one_threshold
from dynaconv.evaluation.cost import CostModel
from dynaconv.evaluation.scoring import score
from dynaconv.progress import Progress

Maker = Callable[..., Path]
BATCHES = [Batch(token_ids(8, 64, seed=seed)) for seed in range(2)]
COST = CostModel(10, 100, 10, 1, 8, 4, 4, 16, 4)


@pytest.mark.parametrize("kind", ["width", "curve", "class", "linear"])
@pytest.mark.parametrize("budget", [0.4, 0.7])
def test_gated_share_is_the_budget(tiny_checkpoint: Maker, kind: str, budget: float) -> None:
    model = dynamic_model(tiny_checkpoint(), kind)
    solved = solve_budget(model, BATCHES, budget, tolerance=0.01, iterations=12)
    spent = score(model, BATCHES, at_one_threshold(solved.threshold, 2)).bytes_share
    assert spent == pytest.approx(solved.share)
    assert spent == pytest.approx(budget, abs=0.01)


def test_padding_does_not_move_the_threshold(tiny_checkpoint: Maker) -> None:
    model = dynamic_model(tiny_checkpoint())
    ids = token_ids(8, 64)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 40:] = False
    junk = ids.clone()
    junk[:, 40:] = 5
    solved = [solve_budget(model, [Batch(i, mask)], 0.5) for i in (ids, junk)]
    assert solved[0] == solved[1]


@pytest.mark.parametrize("kind", ["width", "linear", "none"])
def test_sweep_measures_a_monotone_dial(tiny_checkpoint: Maker, kind: str) -> None:
    folder = tiny_checkpoint(ffn=64)  # blocks of 16, so that a quarter is one block
    model, parent = dynamic_model(folder, kind), dynamic_model(folder, "none")
    config, text = CalibrateConfig(budgets=[0.25, 0.5, 0.75]), Text(BATCHES[:1], BATCHES[1:])
    with Progress(quiet=True).task("calibrate", 8) as task:
        routed = kind != "none"
        table = thresholds_for(model, text, config, task) if routed else uniform_table(model.layout, config.budgets)
        model.layout = model.layout.with_dial(table, None)
        frontier = measure(model, parent, text, (COST, COST), 3, task)
    assert table.budgets == (0.25, 0.5, 0.75, 1.0)
    assert all(a >= b for low, high in pairwise(table.thresholds) for a, b in zip(low, high, strict=True))
    rows = frontier.points
    spent = [row.bytes_share for row in rows]
    assert spent == sorted(spent) and spent[-1] == rows[-1].active_share == 1.0
    assert spent[:3] == pytest.approx([0.25, 0.5, 0.75], abs=0.06 if routed else 1e-9)
    assert rows[-1].quality == pytest.approx(1.0, abs=1e-4) and rows[-1].agreement == 1.0
    assert rows[-1].prompted_quality == pytest.approx(1.0, abs=1e-4)
    assert all(row.tokens_per_s is not None and row.tokens_per_s > 0 for row in [*rows, frontier.parent])
    assert all(len(row.width_by_layer) == 2 for row in rows)
    assert frontier.budgets == table.budgets and frontier.scored_tokens == 8 * 63
    flops = [row.flops_per_token for row in rows]
    assert flops == sorted(flops)
    assert flops[0] == COST.flops_per_token(rows[0].flops_share), "routers run there"
    for row in rows[:3]:
        assert row.exact_share == row.active_share
        assert row.bytes_share == pytest.approx(row.active_share + frontier.router_bytes_share)
    assert (frontier.router_bytes_share > 0) is routed


def test_the_full_dial_costs_what_the_dense_model_does(tiny_checkpoint: Maker) -> None:
    folder = tiny_checkpoint(ffn=64)
    model, parent = dynamic_model(folder), dynamic_model(folder, "none")
    model.layout = model.layout.with_dial(uniform_table(model.layout, [0.5]), None)
    elements = sum(parameter.numel() for ffn in model.ffns() for parameter in ffn.router.parameters())
    cost = CostModel.of(Checkpoint.open(folder), context=32)
    with Progress(quiet=True).task("calibrate", 2) as task:
        frontier = measure(model, parent, Text(BATCHES[:1], BATCHES[1:]), (cost, cost), 0, task)
    half, full = frontier.points
    assert full.flops_per_token == frontier.parent.flops_per_token == cost.flops_per_token(1.0)
    assert full.bytes_per_token == frontier.parent.bytes_per_token == cost.bytes_per_token(1.0)
    without = cost.flops_per_token(half.active_share)
    assert half.flops_per_token == pytest.approx(without + 2 * elements) and half.flops_per_token > without
    assert half.bytes_per_token == pytest.approx(cost.bytes_per_token(half.active_share) + 4 * elements)
