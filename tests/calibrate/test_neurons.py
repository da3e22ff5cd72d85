"""Thresholds and means of single neurons: budgets are met while gated, and means are those of what is off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_models import dynamic_model, neurons_model, token_ids

from dynaconv.calibrate.sweep import grid
from dynaconv.config import CalibrateConfig
from dynaconv.data.windows import Batch
from dynaconv.dynamic.dial import Dial
from dynaconv.dynamic.layout import CopyLayout
from dynaconv.dynamic.recorder import Recorder
from dynaconv.errors import ConfigError
from dynaconv.evaluation.scoring import score
from dynaconv.profile.gated import exact_margin, prepare_means, run_neurons, solve_neurons

Maker = Callable[..., Path]
BATCHES = [Batch(token_ids(8, 48, seed=seed)) for seed in range(2)]
BUDGETS = [0.3, 0.5, 0.7]


def fresh(folder: Path, **settings: Any) -> Any:
    """A model that nothing has been solved for."""
    model = neurons_model(folder, means=(), **settings)
    model.layout = replace(model.layout, dial=None, frontier=None)
    return model


@pytest.mark.parametrize("means", [False, True], ids=["nothing", "means"])
@pytest.mark.parametrize("values", [False, True], ids=["exact", "mixed"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_budgets_are_met_while_gated(tiny_checkpoint: Maker, family: str, values: bool, means: bool) -> None:
    model, budgets = fresh(tiny_checkpoint(family), copy=CopyLayout(4, 32, values)), BUDGETS
    if means:
        prepare_means(model, budgets)
    told: list[tuple[float, float]] = []
    with torch.no_grad():
        table = solve_neurons(
            model, BATCHES, budgets, measure_means=means, solved=lambda budget, spent: told.append((budget, spent))
        )
    assert [budget for budget, _ in told] == budgets[::-1]
    assert table.budgets == (*budgets, 1.0) and table.unit == "bytes"
    assert all(low[0] >= high[0] and len({*low}) == 1 for low, high in pairwise(table.thresholds))
    assert (table.exact != ()) is values
    for row, exact in zip(table.thresholds, table.exact, strict=values):
        assert all(e >= t for t, e in zip(row, exact, strict=True))
        if not values:
            break
    model.layout = model.layout.with_dial(table, None)
    spent = [score(model, BATCHES, model.policy(Dial(budget))) for budget in budgets]
    assert [one.bytes_share for one in spent] == pytest.approx(budgets, abs=0.01)
    if not means:  # what was told is what is spent; means change once more after they were measured
        assert [one.bytes_share for one in spent] == pytest.approx([one for _, one in told[::-1]], abs=1e-6)
    for one in spent:
        assert one.exact_share < one.active_share if values else one.exact_share == one.active_share
    lowest = spent[:1] if family == "opt" else spent  # without a gate, low-bit values of all neurons cost less than .5
    assert all(one.active_share < 1 for one in lowest)


def test_a_budget_that_cannot_be_spent_takes_all_that_give_anything(tiny_checkpoint: Maker) -> None:
    """Pruned neurons give nothing: whatever the budget, they need not be read."""
    model, told = fresh(tiny_checkpoint("opt")), []
    with torch.no_grad():
        for ffn in model.ffns():
            ffn.weights().down[:, ::2] = 0
        table = solve_neurons(model, BATCHES, [0.4, 0.9], measure_means=False, solved=lambda *one: told.append(one))
        model.layout = model.layout.with_dial(table, None)
        assert told[0] == (0.9, pytest.approx(score(model, BATCHES, model.policy(Dial(0.9))).bytes_share))
        assert 0.4 < told[0][1] < 0.7 and told[1][1] == pytest.approx(0.4, abs=0.01)
        ids = BATCHES[0].input_ids
        full, found, low = (model(ids, dial=dial).logits for dial in (1.0, 0.9, 0.4))
    assert float((found - full).norm()) < float((low - full).norm())


@pytest.mark.parametrize("values", [False, True], ids=["exact", "mixed"])
@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_any_budget_can_be_spent(tiny_checkpoint: Maker, family: str, values: bool) -> None:
    """Also what is left when all neurons that a ReLU lets through, or all in low bits, are on."""
    model, budgets = fresh(tiny_checkpoint(family), copy=CopyLayout(4, 32, values)), [0.35, 0.55, 0.75, 0.9]
    with torch.no_grad():
        table = solve_neurons(model, BATCHES, budgets, measure_means=False)
        model.layout = model.layout.with_dial(table, None)
        ids = BATCHES[0].input_ids
        full, *found = (model(ids, dial=dial).logits for dial in (1.0, *budgets))
    assert all(low[0] >= high[0] for rows in (table.thresholds, table.exact) for low, high in pairwise(rows))
    spent = [score(model, BATCHES, model.policy(Dial(budget))).bytes_share for budget in budgets]
    assert spent == pytest.approx(budgets, abs=0.02)
    errors = [float((one - full).norm()) for one in found]
    assert errors == sorted(errors, reverse=True)


def test_means_are_those_of_the_tokens_for_which_a_neuron_is_off(tiny_checkpoint: Maker) -> None:
    """In the first layer, whose inputs do not depend on what is off anywhere; padding counts nowhere."""
    mask = torch.ones(8, 48, dtype=torch.bool)
    mask[3:, 20:] = False
    batches, model = [Batch(BATCHES[0].input_ids, mask), BATCHES[1]], fresh(tiny_checkpoint("llama", layers=1))
    prepare_means(model, BUDGETS)
    with torch.no_grad():
        table = solve_neurons(model, batches, BUDGETS, measure_means=True)
    model.layout = model.layout.with_dial(table, None)
    (ffn,) = model.ffns()
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Keeping(Recorder):
        wants_hidden = True

        def record(self, record: Any) -> None:
            found.append((record.hidden, record.choice.on))

    for place, budget in enumerate(BUDGETS):
        found.clear()
        with torch.no_grad():
            for batch in batches:
                with model.call.using(model.policy(Dial(budget)), Keeping()):
                    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        real = [mask, torch.ones_like(mask)]
        hidden = torch.cat([one[kept] for (one, _), kept in zip(found, real, strict=True)]).double()
        off = torch.cat([~one[kept] for (_, one), kept in zip(found, real, strict=True)])
        seen = off.sum(0) > 0
        expected = (hidden * off).sum(0) / off.sum(0).clamp_min(1)
        torch.testing.assert_close(ffn.means[place][seen].double(), expected[seen], rtol=1e-4, atol=1e-5)
        assert bool(seen.any())


def test_means_help(tiny_checkpoint: Maker) -> None:
    """At the same threshold the output is nearer to the parent's with what is off on average than without."""
    folder = tiny_checkpoint("llama", layers=1)
    model = fresh(folder)
    prepare_means(model, BUDGETS)
    with torch.no_grad():
        table = solve_neurons(model, BATCHES, BUDGETS, measure_means=True)
        model.layout = model.layout.with_dial(table, None)
        ids = BATCHES[0].input_ids
        full, policy = model(ids).logits, model.policy(Dial(0.3))
        errors = []
        for means in (policy.means, None):
            with model.call.using(replace(policy, means=means)):
                errors.append(float((model(ids).logits - full).square().mean()))
    assert errors[0] < errors[1]


def test_padding_moves_nothing(tiny_checkpoint: Maker) -> None:
    model, ids = fresh(tiny_checkpoint()), BATCHES[0].input_ids
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 30:] = False
    junk = ids.masked_fill(~mask, 5)
    with torch.no_grad():
        tables = [solve_neurons(model, [Batch(one, mask)], [0.5], measure_means=False) for one in (ids, junk)]
    assert tables[0] == tables[1]


def test_the_margin_grows_with_the_bits_of_low_bit_values(tiny_checkpoint: Maker) -> None:
    folder = tiny_checkpoint()
    assert exact_margin(fresh(folder, copy=CopyLayout(4, 32, values=False))) == 0.0
    margins = [exact_margin(fresh(folder, copy=CopyLayout(bits))) for bits in (3, 4, 5)]
    assert 0 < margins[0] < margins[1] < margins[2]


def test_means_of_other_budgets_are_interpolated(tiny_checkpoint: Maker) -> None:
    model = neurons_model(tiny_checkpoint(), means=(0.25, 0.5))
    before, cost = [ffn.means.detach().clone() for ffn in model.ffns()], model.ffns()[0].cost
    prepare_means(model, [0.2, 0.25, 0.375, 0.5, 0.8])
    assert model.layout.means == (0.2, 0.25, 0.375, 0.5, 0.8) and model.ffns()[0].cost == cost
    for ffn, (low, high) in zip(model.ffns(), before, strict=True):
        torch.testing.assert_close(ffn.means, torch.stack([low, low, (low + high) / 2, high, high]))


def test_recorded_scores_are_those_of_the_routers(tiny_checkpoint: Maker) -> None:
    model = neurons_model(tiny_checkpoint())
    policy = model.policy(Dial(0.4))
    seen = run_neurons(model, BATCHES, policy, None)
    expected = score(model, BATCHES, policy)
    assert seen.share == pytest.approx(expected.bytes_share)
    assert int(seen.scores_of_all.compared.counts.sum()) == 2 * 96 * sum(batch.tokens for batch in BATCHES)


@pytest.mark.parametrize("values", [False, True])
def test_a_grid_fits_the_model(tiny_checkpoint: Maker, values: bool) -> None:
    model = fresh(tiny_checkpoint(), copy=CopyLayout(4, 32, values))
    fixed = model.ffns()[0].cost.bytes.fixed
    for one in (model, dynamic_model(tiny_checkpoint(), "linear")):
        budgets = grid(one, CalibrateConfig())
        assert budgets == sorted(set(budgets)) and one.ffns()[0].cost.bytes.fixed < budgets[0] and budgets[-1] < 1
        assert grid(one, CalibrateConfig(budgets=[0.6, 1.0])) == [0.6]
    with pytest.raises(ConfigError, match=rf"begins at 0\.01, but the routers alone read {fixed:.3f}"):
        grid(model, CalibrateConfig(budgets=[0.01, 0.5]))
