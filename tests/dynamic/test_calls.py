"""The dial belongs to a model and a call: drafts, nested calls, threads, views, generation and recomputation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_models import dynamic_model, token_ids
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from dynaconv import Dial
from dynaconv.dynamic.recorder import Recorder

Maker = Callable[..., Path]
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
every_kind = pytest.mark.parametrize("kind", ["width", "linear"])


def spent(model: Any, run: Callable[[], Any]) -> set[float]:
    """Mean shares of the forward passes that ``run`` makes of ``model``."""
    recorder = Recorder()
    with model.call.using(recorder=recorder):
        run()
    return {round(float(one.mean()), 6) for one in recorder.shares[0]}


def test_a_draft_keeps_its_own_dial_inside_a_targets_generate(tiny_checkpoint: Maker) -> None:
    """Widths are uniform (router kind ``none``): .25 is one block of four, .5 two, and 1 all, as of prompts."""
    target, draft = (dynamic_model(tiny_checkpoint(seed=seed), "none") for seed in (0, 1))
    ids, drafted, verified = token_ids(1, 7), Recorder(), Recorder()
    draft.dial = 0.25
    expected = target.generate(ids, dial=0.5, **GREEDY)
    with draft.call.using(recorder=drafted), target.call.using(recorder=verified):
        found = target.generate(ids, dial=0.5, assistant_model=draft, **GREEDY)
    assert torch.equal(found, expected)
    assert {float(one) for one in drafted.all_shares().unique()} == {0.25, 1.0}
    assert {float(one) for one in verified.all_shares().unique()} == {0.5, 1.0}
    for recorder in (drafted, verified):
        assert int((recorder.all_shares()[0] == 1).sum()) == ids.shape[1], "the prompt is read once, at the full dial"


@every_kind
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_view_drafts_for_its_own_model(tiny_checkpoint: Maker, family: str, kind: str) -> None:
    model, ids = dynamic_model(tiny_checkpoint(family), kind), token_ids(1, 7)
    for dial in (1.0, 0.5):
        expected = model.generate(ids, dial=Dial(dial, controlled=False), **GREEDY)
        assert torch.equal(model.generate(ids, dial=dial, assistant_model=model.at(0.25), **GREEDY), expected)
    assert model.dial == Dial.full()


def test_a_view_drafts_at_its_own_share(tiny_checkpoint: Maker) -> None:
    model, ids = dynamic_model(tiny_checkpoint(), "none"), token_ids(1, 7)
    recorder = Recorder()
    with model.call.using(recorder=recorder):
        model.generate(ids, dial=0.5, assistant_model=model.at(0.25), **GREEDY)
    assert {float(one) for one in recorder.all_shares().unique()} == {0.25, 0.5, 1.0}


def test_a_view_shares_every_tensor_and_nothing_of_the_dial(tiny_checkpoint: Maker) -> None:
    model, ids = dynamic_model(tiny_checkpoint()), token_ids()
    view = model.at(0.25)
    ours, theirs = model.state_dict(keep_vars=True), view.state_dict(keep_vars=True)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in ours)
    with torch.no_grad():
        low = model(ids, dial=0.25).logits
        full = model(ids).logits
        assert torch.equal(view(ids).logits, low)
        model.dial = 0.5
        assert torch.equal(view(ids).logits, low), "the view follows its model's dial"
        view.dial = 1.0
        assert torch.equal(model(ids).logits, model(ids, dial=0.5).logits), "the model follows its view's dial"
        assert torch.equal(view(ids).logits, full)
        assert torch.equal(view(ids, dial=0.5).logits, model(ids, dial=0.5).logits)
    assert type(view) is type(model)
    view.generation_config.max_length = 3
    assert model.generation_config.max_length != 3


def test_a_view_of_a_model_that_generation_compiled_is_not_that_model(tiny_checkpoint: Maker) -> None:
    model, ids = dynamic_model(tiny_checkpoint(), "none"), token_ids()
    model._compiled_call = model.__call__  # what transformers keeps there: a function that calls ``model``
    view, shares = model.at(0.25), Recorder()
    with torch.no_grad(), view.call.using(recorder=shares):
        getattr(view, "_compiled_call", view)(ids)
    assert float(shares.all_shares().mean()) == 0.25


class CallsItsModel(LogitsProcessor):
    """Calls the model that is generating, at another dial, in each step."""

    def __init__(self, call: Callable[[Tensor], Any]) -> None:
        self.call = call

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.call(input_ids)
        return scores


@pytest.mark.parametrize("how", ["forward", "generate", "view"])
@every_kind
def test_a_call_inside_generate_leaves_its_dial_alone(tiny_checkpoint: Maker, kind: str, how: str) -> None:
    model, ids = dynamic_model(tiny_checkpoint(), kind), token_ids(2, 7)
    view = model.at(0.25)
    inside = {
        "forward": lambda given: model(given, dial=0.25),
        "generate": lambda given: model.generate(
            given, dial=0.25, **{**GREEDY, "max_new_tokens": 2, "min_new_tokens": 2}
        ),
        "view": lambda given: view(given),
    }[how]
    expected = model.generate(ids, dial=0.5, output_logits=True, return_dict_in_generate=True, **GREEDY)
    found = model.generate(
        ids,
        dial=0.5,
        output_logits=True,
        return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([CallsItsModel(inside)]),
        **GREEDY,
    )
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("own", [False, True], ids=["dial=", "model.dial"])
@every_kind
def test_a_forward_pass_inside_another_leaves_its_dial_alone(
    tiny_checkpoint: Maker, kind: str, own: bool, gradients: bool
) -> None:
    model, ids, inner = dynamic_model(tiny_checkpoint(), kind), token_ids(), []
    given = {} if own else {"dial": 0.5}
    model.dial = 0.5 if own else 1.0
    with torch.set_grad_enabled(gradients):
        expected, low = model(ids, **given).logits, model(ids, dial=0.25).logits

        def nested(*_: Any) -> None:
            if not inner:
                inner.append(None)  # not again inside itself
                inner[0] = model(ids, dial=0.25).logits

        hook = model.model.layers[0].self_attn.register_forward_hook(nested)
        assert torch.equal(model(ids, **given).logits, expected)
        hook.remove()
    assert torch.equal(inner[0], low)


@every_kind
def test_policies_keep_the_thresholds_that_they_were_made_with(tiny_checkpoint: Maker, kind: str) -> None:
    model, ids = dynamic_model(tiny_checkpoint(), kind), token_ids()
    with torch.no_grad():
        expected = model(ids, dial=0.25).logits
        low, _ = model.policy(0.25), model.policy(0.5)
        with model.call.using(low):
            assert torch.equal(model(ids).logits, expected)


def test_a_step_may_name_its_own_dial_inside_generate(tiny_checkpoint: Maker) -> None:
    model, ids = dynamic_model(tiny_checkpoint(), "none"), token_ids()
    with model.dialed(0.25):
        assert spent(model, lambda: (model(ids), model(ids, dial=0.5), model(ids))) == {0.25, 0.5}
        with model.dialed(0.5):
            assert spent(model, lambda: model(ids)) == {0.5}
        assert spent(model, lambda: model(ids)) == {0.25}
    assert spent(model, lambda: model(ids)) == {1.0}


@every_kind
def test_threads_do_not_see_each_others_dials(tiny_checkpoint: Maker, kind: str) -> None:
    model, ids, wrong = dynamic_model(tiny_checkpoint(), kind), token_ids(2, 9), []
    dials = (0.25, 0.5, 1.0, [0.25, 1.0])
    with torch.no_grad():
        forwards = [model(ids, dial=dial).logits for dial in dials]
    generated = [model.generate(ids, dial=dial, **GREEDY) for dial in dials]
    ready = threading.Barrier(len(dials))

    def work(number: int) -> None:
        dial = dials[number]
        try:
            for _ in range(6):
                ready.wait()
                with torch.no_grad():
                    found = model(ids, dial=dial).logits
                if not torch.equal(found, forwards[number]):
                    wrong.append(("forward", dial))
                if not torch.equal(model.generate(ids, dial=dial, **GREEDY), generated[number]):
                    wrong.append(("generate", dial))
        except Exception as error:
            wrong.append(("error", repr(error)))
            ready.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(dials))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@every_kind
def test_inference_mode_leaves_nothing_behind(tiny_checkpoint: Maker, kind: str) -> None:
    model, ids = dynamic_model(tiny_checkpoint(), kind), token_ids()
    with torch.no_grad():
        expected = model(ids, dial=0.5).logits
    with torch.inference_mode():
        model.dial = 0.25
        low = model(ids).logits
        assert torch.equal(model(ids, dial=0.5).logits, expected)
        tokens = model.generate(ids, dial=0.5, **GREEDY)
    assert torch.equal(model.generate(ids, dial=0.5, **GREEDY), tokens)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, low)
    model.train()(ids, labels=ids).loss.backward()
    model.dial = 0.5
    model(ids, labels=ids).loss.backward()


@pytest.mark.parametrize("how", ["beams", "static cache", "returned sequences", "without cache"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_generation_at_a_list_of_dials(tiny_checkpoint: Maker, family: str, how: str) -> None:
    extra: dict[str, Any] = {
        "beams": {"num_beams": 3},
        "static cache": {"cache_implementation": "static", "disable_compile": True},
        "returned sequences": {"num_beams": 4, "num_return_sequences": 2},
        "without cache": {"use_cache": False},
    }[how]
    model, ids, dials = dynamic_model(tiny_checkpoint(family), "linear"), token_ids(3, 7), [0.25, 1.0, 0.5]
    together = model.generate(ids, dial=dials, **GREEDY, **extra).view(3, -1, 15)
    for row, dial in enumerate(dials):
        alone = model.generate(ids[row : row + 1], dial=dial, **GREEDY, **extra)
        assert torch.equal(together[row], alone)
    if how == "static cache":
        assert torch.equal(together.view(3, -1), model.generate(ids, dial=dials, **GREEDY))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@every_kind
def test_a_recomputation_runs_at_the_models_dial_of_its_forward_pass(
    tiny_checkpoint: Maker, family: str, kind: str
) -> None:
    """Activation checkpointing: the dial is turned between the forward and the backward pass."""
    folder = tiny_checkpoint(family)

    def gradients(checkpointing: bool) -> list[Tensor]:
        model, ids = dynamic_model(folder, kind).train(), token_ids()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.dial = 0.25
        loss = model(ids, labels=ids, use_cache=False).loss
        model.dial = 0.5
        with model.dialed(0.5), torch.no_grad():
            model(ids)
        loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == len(recomputed) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_a_recorder_hears_a_recomputed_pass_once(tiny_checkpoint: Maker) -> None:
    model, ids, recorder = dynamic_model(tiny_checkpoint()).train(), token_ids(), Recorder()
    model.gradient_checkpointing_enable()
    with model.call.using(recorder=recorder):
        model(ids, labels=ids, use_cache=False, dial=0.5).loss.backward()
    assert [len(passes) for passes in recorder.widths.values()] == [1, 1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_call_that_failed_leaves_nothing_behind(tiny_checkpoint: Maker, family: str) -> None:
    model, ids = dynamic_model(tiny_checkpoint(family)), token_ids()
    with torch.no_grad():
        expected = model(ids, dial=0.5).logits
        ffn = model.ffns()[0]

        def fail(*_: Any) -> None:
            raise RuntimeError("on purpose")

        hook = ffn.router.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(ids, dial=0.5)
        hook.remove()
        assert model.call.policy is None
        listener = ffn.projections()[-1].register_forward_hook(lambda *_: None)  # modules are called one by one now
        torch.testing.assert_close(model(ids, dial=0.5).logits, expected)
        listener.remove()
        assert torch.equal(model(ids, dial=0.5).logits, expected)


@pytest.mark.parametrize("family", ["gpt2", "opt", "starcoder2"])
def test_a_hook_on_the_activation_of_an_ungated_ffn_sees_activations(tiny_checkpoint: Maker, family: str) -> None:
    model, ids, seen = dynamic_model(tiny_checkpoint(family, ffn=67)), token_ids(), []
    between = [module for module in model.modules() if type(module).__name__ == "Between"]
    with torch.no_grad():
        expected = model(ids, dial=0.5).logits
        hook = between[0].register_forward_hook(lambda _, given, out: seen.append((given[0].shape, out.shape)))
        torch.testing.assert_close(model(ids, dial=0.5).logits, expected)
        hook.remove()
    assert {shape[-1] for shapes in seen for shape in shapes} == {67}
