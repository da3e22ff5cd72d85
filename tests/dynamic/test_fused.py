"""Generation through fused kernels: what router and reference decide and compute, and when these run instead."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_models import neurons_model, token_ids
from tiny_families import FAMILIES

from dynaconv import Dial
from dynaconv.dynamic.recorder import Recorder
from dynaconv.kernels import dispatch
from dynaconv.kernels.cpu_sketched import CPU_SKETCHED
from dynaconv.kernels.sketched import SketchedBackend

pytest.importorskip("numba")

Maker = Callable[..., Path]
BASE = Path(__file__).parents[3] / "shared" / "models" / "base-code-4m"


@contextmanager
def backends(*given: SketchedBackend) -> Iterator[None]:
    before = dispatch.SKETCHED[:]
    dispatch.SKETCHED[:] = given
    try:
        yield
    finally:
        dispatch.SKETCHED[:] = before


@contextmanager
def counted() -> Iterator[list[int]]:
    """Tokens of each call of the CPU's backend."""
    calls: list[int] = []

    def run(ffn: Any, x: Any, asked: Any) -> Any:
        calls.append(len(x))
        return CPU_SKETCHED.run(ffn, x, asked)

    with backends(CPU_SKETCHED._replace(run=run)):
        yield calls


def generated(model: Any, ids: torch.Tensor, dial: Any, **settings: Any) -> torch.Tensor:
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | settings
    found: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), dial=dial, **settings)
    return found


def assert_close_but_for_ties(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Of most tokens to rounding; of some, a neuron whose score is nearly the threshold falls on the other side."""
    error = (found - expected).flatten(0, 1).norm(dim=-1) / expected.flatten(0, 1).norm(dim=-1)
    assert float(error.median()) < 1e-3
    assert float(error.max()) < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_family_are_those_of_the_reference(tiny_checkpoint: Maker, family: str) -> None:
    model, ids = neurons_model(tiny_checkpoint(family, hidden=64, ffn=67)), token_ids(2, 3)
    for budget in (0.3, 0.5, 0.8):
        with torch.no_grad():
            with counted() as calls:
                found = model(ids, dial=budget).logits
            with backends():
                expected = model(ids, dial=budget).logits
        assert calls == [6] * len(model.ffns())
        assert_close_but_for_ties(found, expected)


def test_a_controller_spends_the_same(tiny_checkpoint: Maker) -> None:
    model, ids = neurons_model(tiny_checkpoint("llama", hidden=64, ffn=67)), token_ids(3, 5)
    dials = [Dial(budget=0.3), Dial(budget=0.5), Dial(budget=0.4, controlled=False)]
    excess = []
    for given in ((CPU_SKETCHED,), ()):
        policy = model.controlled(model.policy(dials), dials)
        policy.require(3)
        with backends(*given), torch.no_grad(), model.call.using(policy):
            for step in range(5):
                model(ids[:, step : step + 1])
        excess.append(policy.excess)
    assert excess[0].abs().max() > 0
    torch.testing.assert_close(excess[0], excess[1], rtol=1e-4, atol=1e-5)


def test_prompts_beams_and_batches_generate_the_same_tokens(tiny_checkpoint: Maker) -> None:
    model, ids = neurons_model(tiny_checkpoint("llama", hidden=64, ffn=67)), token_ids(2, 9)
    for dial, settings in (
        (0.4, {}),
        ([0.3, 0.6], {}),
        (0.4, {"num_beams": 2}),
        (Dial(budget=0.5, controlled=False), {}),
    ):
        with counted() as calls:
            found = generated(model, ids, dial, **settings)
        with backends():
            expected = generated(model, ids, dial, **settings)
        assert torch.equal(found, expected)
        assert calls, "the prompt is read at the full dial, what follows is not"


def test_the_copy_follows_weights_that_change(tiny_checkpoint: Maker) -> None:
    model, ids = neurons_model(tiny_checkpoint("llama", hidden=64, ffn=67)), token_ids(2, 3)
    with torch.no_grad():
        before = model(ids, dial=0.5).logits
        for ffn in model.ffns():
            ffn.weights().up.mul_(-1)
            ffn.means.mul_(2)
        after = model(ids, dial=0.5).logits
        with backends():
            expected = model(ids, dial=0.5).logits
    assert not torch.allclose(before, after)
    assert_close_but_for_ties(after, expected)


def test_biases_and_means_that_change_are_followed(tiny_checkpoint: Maker) -> None:
    model, ids = neurons_model(tiny_checkpoint("llama", hidden=64, ffn=67, mlp_bias=True)), token_ids(2, 3)
    with torch.no_grad():
        for _ in range(3):
            for budget in (0.3, 0.6):  # each call's thresholds and means may lie where those of another did
                found = model(ids, dial=budget).logits
                with backends():
                    assert_close_but_for_ties(found, model(ids, dial=budget).logits)
            for ffn in model.ffns():
                ffn.means.add_(0.1)
                for bias in (ffn.weights().gate_bias, ffn.weights().down_bias):
                    bias.add_(0.3)


def test_adapters_that_come_after_a_call_are_called(tiny_checkpoint: Maker) -> None:
    peft = pytest.importorskip("peft")
    model, ids = neurons_model(tiny_checkpoint("llama", hidden=64, ffn=67)), token_ids(2, 3)
    with torch.no_grad(), counted() as calls:
        model(ids, dial=0.5)
        assert calls
        settings = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, settings)
        calls.clear()
        adapted(input_ids=ids, dial=0.5)
        assert not calls


def test_other_ways_are_taken_where_somebody_looks_or_listens(tiny_checkpoint: Maker) -> None:
    model, ids = neurons_model(tiny_checkpoint("llama", hidden=64, ffn=67)), token_ids(1, 2)
    with counted() as calls:
        model(ids, dial=0.5)  # records gradients
        with torch.no_grad():
            with model.call.using(recorder=Recorder()):
                model(ids, dial=0.5)
            model(token_ids(1, 9), dial=0.5)
            handles = [one.register_forward_hook(lambda *_: None) for ffn in model.ffns() for one in ffn.projections()]
            model(ids, dial=0.5)
            assert not calls
            for handle in handles:
                handle.remove()
            model(ids, dial=0.5)
    assert calls


def test_models_that_have_run_copy_and_pickle(tiny_checkpoint: Maker) -> None:
    model, ids = neurons_model(tiny_checkpoint("llama", hidden=64, ffn=67)), token_ids(1, 2)
    with torch.no_grad():
        expected = model(ids, dial=0.5).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(other(ids, dial=0.5).logits, expected)


@pytest.mark.skipif(not BASE.is_dir(), reason="no pretrained model is here")
def test_a_pretrained_model_generates_the_same_tokens_at_five_dials() -> None:
    model = neurons_model(BASE).float()
    ids = token_ids(1, 16)
    for budget in (0.25, 0.3, 0.4, 0.6, 0.8):
        with counted() as calls:
            found = generated(model, ids, budget, max_new_tokens=128, min_new_tokens=128)
        with backends():
            assert torch.equal(found, generated(model, ids, budget, max_new_tokens=128, min_new_tokens=128))
        assert len(calls) == 127 * len(model.ffns())
