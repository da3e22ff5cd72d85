"""Generation holds its budget: what is spent too much is saved later, for each sequence by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_models import neurons_model, token_ids

from dynaconv import Dial
from dynaconv.dynamic.controller import Controlled
from dynaconv.dynamic.recorder import Recorder

Maker = Callable[..., Path]


def controlled(model: Any, dials: Any) -> Controlled:
    made = model.controlled(model.policy(dials), dials)
    assert isinstance(made, Controlled)
    return made


def spent(model: Any, policy: Any, ids: torch.Tensor) -> torch.Tensor:
    """Bytes of each token, (B, T), read one token at a time."""
    recorder, cache = Recorder(), None
    with torch.no_grad(), model.call.using(policy, recorder):
        for step in range(ids.shape[1]):
            if isinstance(policy, Controlled):
                policy.require(len(ids))
            cache = model(ids[:, step : step + 1], past_key_values=cache, use_cache=True).past_key_values
    return recorder.all_costs()[2].mean(0).view(ids.shape[1], len(ids)).T


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_mean_comes_nearer_to_the_budget(tiny_checkpoint: Maker, family: str) -> None:
    """The hand-made thresholds spend something else than their budgets say."""
    model, ids = neurons_model(tiny_checkpoint(family)), token_ids(2, 60)
    dial = Dial(0.3)
    free, held = (spent(model, one, ids).mean(1) for one in (model.policy(dial), controlled(model, dial)))
    assert bool(((held - 0.3).abs() < 0.7 * (free - 0.3).abs()).all()), (free, held)


def test_the_excess_is_what_was_spent_too_much(tiny_checkpoint: Maker) -> None:
    model, ids = neurons_model(tiny_checkpoint()), token_ids(3, 9)
    policy = controlled(model, Dial(0.4))
    found = spent(model, policy, ids).float()
    torch.testing.assert_close(policy.excess, (found - 0.4).sum(1), rtol=1e-4, atol=1e-4)


def test_sequences_do_not_pay_for_each_other(tiny_checkpoint: Maker) -> None:
    model, ids = neurons_model(tiny_checkpoint()), token_ids(2, 30)
    dials = (Dial(0.3), Dial(0.6))
    together = spent(model, controlled(model, dials), ids)
    for row, dial in enumerate(dials):
        alone = spent(model, controlled(model, dial), ids[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=2e-2)


def test_what_needs_no_controller_has_none(tiny_checkpoint: Maker) -> None:
    model = neurons_model(tiny_checkpoint())
    for dial in (Dial.full(), Dial.uniform(7), Dial(0.3, controlled=False)):
        policy = model.policy(dial)
        assert model.controlled(policy, dial) is policy
