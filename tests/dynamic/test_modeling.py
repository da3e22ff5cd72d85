"""Dynamic models compute what the reference says, at every dial, in forward, in generation and when recomputed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dynamic_models import dynamic_model, masked_neurons, token_ids
from tiny_families import FAMILIES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import dynaconv
from dynaconv import Dial
from dynaconv.dynamic.policy import AfterPrompt
from dynaconv.dynamic.recorder import Recorder
from dynaconv.kernels.choice import Prefix, Subset
from dynaconv.kernels.reference import blocked_ffn

Maker = Callable[..., Path]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["width", "curve", "class", "linear", "none"])
def test_full_dial_is_the_parent(tiny_checkpoint: Maker, family: str, kind: str) -> None:
    folder = tiny_checkpoint(family, tied=kind == "width", ffn=67 if kind == "class" else 96)
    parent, ids = AutoModelForCausalLM.from_pretrained(folder).eval(), token_ids()
    model = dynamic_model(folder, kind)
    with torch.no_grad():
        expected = parent(ids).logits
        assert close(model(ids, dial=1.0).logits, expected)
        assert close(model(ids, dial=[1.0, Dial.full()]).logits, expected)
        assert not close(model(ids, dial=0.25).logits, expected, 1e-3)


@pytest.mark.parametrize(
    ("family", "kind"), [*((family, "width") for family in FAMILIES), ("llama", "curve"), ("llama", "class")]
)
def test_every_ffn_is_the_reference_at_its_widths(tiny_checkpoint: Maker, family: str, kind: str) -> None:
    biased = {"mlp_bias": True} if family in ("llama", "granite") else {}
    model = dynamic_model(tiny_checkpoint(family, ffn=67, **biased), kind)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for ffn in model.ffns():
        ffn.register_forward_hook(lambda m, args, out: seen.update({m.site.index: (args[0], out)}))
    with torch.no_grad(), model.call.using(recorder=(trace := Recorder())):
        model(token_ids(4, 20), dial=0.5)
    used: set[int] = set()
    for ffn in model.ffns():
        x, out = seen[ffn.site.index]
        widths = trace.widths[ffn.site.index][0]
        used |= set(widths.flatten().tolist())
        rows = blocked_ffn(ffn.blocked(), x.flatten(0, -2), Prefix(widths.flatten()))
        assert close(out.flatten(0, -2), rows)
    assert len(used) > 2, "the test's routers should not agree on everything"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_ffn_is_the_reference_on_the_blocks_its_router_wants(tiny_checkpoint: Maker, family: str) -> None:
    model = dynamic_model(tiny_checkpoint(family), "linear", blocks=6)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for ffn in model.ffns():
        ffn.register_forward_hook(lambda m, args, out: seen.update({m.site.index: (args[0], out)}))
    for dial in (0.5, Dial.uniform(2)):
        with torch.no_grad(), model.call.using(recorder=(trace := Recorder())):
            model(token_ids(4, 20), dial=dial)
        for ffn in model.ffns():
            x, out = (one.flatten(0, -2) for one in seen[ffn.site.index])
            scores = ffn.router(x)
            on = scores > 0 if dial == 0.5 else scores >= scores.topk(2, dim=-1).values[:, -1:]
            assert close(out, blocked_ffn(ffn.blocked(), x, Subset(on)))
            assert torch.equal(trace.widths[ffn.site.index][0].flatten(), on.sum(-1))
            assert len(on.unique(dim=0)) > 3, "the test's routers should not agree on everything"


@pytest.mark.parametrize("kind", ["width", "linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_and_inference_paths_agree(tiny_checkpoint: Maker, family: str, kind: str) -> None:
    model, ids = dynamic_model(tiny_checkpoint(family), kind), token_ids(3, 16)
    with_gradient = model(ids, dial=0.5).logits
    with torch.no_grad():
        assert close(model(ids, dial=0.5).logits, with_gradient.detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_width_is_the_stock_model_without_the_other_neurons(tiny_checkpoint: Maker, family: str) -> None:
    folder, ids = tiny_checkpoint(family, ffn=67, tied=True), token_ids(2, 12)
    stock, model = AutoModelForCausalLM.from_pretrained(folder).train(), dynamic_model(folder, "none").train()
    names = set(stock.state_dict())
    for width in (0, 1, 3):
        with masked_neurons(stock, family, range(model.layout.partition.edges[width])):
            expected = stock(ids, labels=ids)
        found = model(ids, labels=ids, dial=Dial.uniform(width))
        assert close(found.logits, expected.logits)
        for one in (stock, model):
            one.zero_grad()
        expected.loss.backward()
        found.loss.backward()
        for name, parameter in stock.named_parameters():
            gradient = model.dense_state()[name].grad
            if parameter.grad is None or not bool(parameter.grad.any()):
                assert gradient is None or not bool(gradient.any()), name
            else:
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6 * parameter.grad.abs().max())
    assert set(model.dense_state()) == names


@pytest.mark.parametrize(
    ("family", "settings"),
    [("gpt2", {"resid_pdrop": 0.5}), ("opt", {"dropout": 0.5}), ("starcoder2", {"residual_dropout": 0.5})],
)
def test_what_stands_around_an_ungated_ffn_stays(tiny_checkpoint: Maker, family: str, settings: dict[str, Any]) -> None:
    folder, ids = tiny_checkpoint(family, **settings), token_ids()
    stock, model = AutoModelForCausalLM.from_pretrained(folder).train(), dynamic_model(folder).train()
    with torch.no_grad():
        torch.manual_seed(0)
        expected = stock(ids).logits
        torch.manual_seed(0)
        assert torch.equal(model(ids, dial=1.0).logits, expected)


@pytest.mark.parametrize("kind", ["width", "linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_cache_equals_generation_without(tiny_checkpoint: Maker, family: str, kind: str) -> None:
    model, ids = dynamic_model(tiny_checkpoint(family), kind), token_ids(2, 7)
    settings: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    dial = Dial(0.5, prompt=0.5, controlled=False)
    cached = model.generate(ids, dial=dial, **settings)
    plain = model.generate(ids, dial=dial, use_cache=False, **settings)
    assert torch.equal(cached, plain)
    with torch.no_grad():  # and its tokens are those that the dial's own forward pass prefers
        logits = model(cached, dial=0.5).logits
    logits[..., 0] = -torch.inf  # min_new_tokens keeps the end of text away
    assert torch.equal(logits[:, 6:-1].argmax(-1), cached[:, 7:])
    cached = model.generate(ids, dial=Dial(0.5, controlled=False), **settings)  # the prompt at the full dial
    with torch.no_grad(), model.call.using(AfterPrompt(model.policy(0.5), 7, 15)):
        logits = model(cached).logits
    logits[..., 0] = -torch.inf
    assert torch.equal(logits[:, 6:-1].argmax(-1), cached[:, 7:])


@pytest.mark.parametrize("kind", ["width", "linear"])
@pytest.mark.parametrize("family", ["llama", "opt"])  # OPT flattens the batch
def test_one_dial_a_sequence(tiny_checkpoint: Maker, family: str, kind: str) -> None:
    model, ids = dynamic_model(tiny_checkpoint(family), kind), token_ids(3, 10)
    dials = [0.25, 1.0, 0.5]
    settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, dial=dials, **settings)
    beams = model.generate(ids, dial=dials, num_beams=2, **settings)
    for row, dial in enumerate(dials):
        alone = ids[row : row + 1]
        assert torch.equal(together[row], model.generate(alone, dial=dial, **settings)[0])
        assert torch.equal(beams[row], model.generate(alone, dial=dial, num_beams=2, **settings)[0])
    with pytest.raises(ValueError, match="dials"):
        model(ids, dial=[0.25, 1.0])


def test_the_dial_belongs_to_the_call(tiny_checkpoint: Maker) -> None:
    model, ids = dynamic_model(tiny_checkpoint()), token_ids()
    with torch.no_grad():
        full = model(ids).logits
        low = model(ids, dial=0.25).logits
        assert torch.equal(model(ids).logits, full), "a call left its dial behind"
        with pytest.raises(IndexError):
            model(ids + 1000, dial=0.25)
        assert torch.equal(model(ids).logits, full), "a failed call left its dial behind"
        model.dial = Dial(0.25)
        assert torch.equal(model(ids).logits, low)


@pytest.mark.parametrize("turn_on", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
def test_checkpointed_layers_recompute_under_their_own_dial(tiny_checkpoint: Maker, turn_on: str) -> None:
    if not hasattr(transformers.PreTrainedModel, turn_on):
        pytest.skip("this transformers does not have it")
    folder, calls = tiny_checkpoint(), []

    def gradients(checkpointing: bool) -> list[Tensor]:
        model, ids = dynamic_model(folder).train(), token_ids()
        if checkpointing:
            getattr(model, turn_on)()
        model.ffns()[0].gate_proj.register_forward_hook(lambda *args: calls.append(checkpointing))
        losses = [model(ids, labels=ids, dial=dial, use_cache=False).loss for dial in (0.25, 1.0)]
        with torch.no_grad():
            model(ids, dial=0.5)  # another call in between must not leak into the recomputation
        sum(losses).backward()  # type: ignore[union-attr]
        return [p.grad for ffn in model.ffns() for p in ffn.parameters() if p.grad is not None]

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == len(recomputed) > 0
    assert calls.count(True) == calls.count(False) + 2, "two passes were to be recomputed"
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)


def test_reentrant_checkpointing_is_refused(tiny_checkpoint: Maker) -> None:
    with pytest.raises(ValueError, match="use_reentrant=False"):
        dynamic_model(tiny_checkpoint()).gradient_checkpointing_enable({"use_reentrant": True})


def test_widths_are_nested_and_monotone_in_the_dial(tiny_checkpoint: Maker) -> None:
    model, ids = dynamic_model(tiny_checkpoint(layers=1)), token_ids(4, 30)  # one layer: hidden states stay the same
    last = torch.zeros(1, 120)
    for budget in (0.25, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0):
        with torch.no_grad(), model.call.using(recorder=(trace := Recorder())):
            model(ids, dial=budget)
        widths = trace.all_widths()
        assert bool((widths >= last).all())
        last = widths
    assert bool((last == 4).all())


@pytest.mark.parametrize(("family", "kind"), [*((family, "width") for family in FAMILIES), ("llama", "none")])
def test_saved_and_loaded_it_is_the_same(tiny_checkpoint: Maker, tmp_path: Path, family: str, kind: str) -> None:
    model, ids = dynamic_model(tiny_checkpoint(family, tied=True), kind), token_ids()
    model.save_pretrained(tmp_path / "saved")
    again = dynaconv.load(tmp_path / "saved").eval()
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again(ids, dial=0.5).logits, model(ids, dial=0.5).logits)
        assert close(stock.eval()(ids).logits, model(ids, dial=1.0).logits)


def test_routers_of_another_model_are_refused(tiny_checkpoint: Maker, tmp_path: Path) -> None:
    model = dynamic_model(tiny_checkpoint())
    model.save_pretrained(tmp_path / "saved")
    other = dynamic_model(tiny_checkpoint(), "curve")
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "dynaconv.safetensors").replace(tmp_path / "saved" / "dynaconv.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        dynaconv.load(tmp_path / "saved")
    with pytest.raises(ValueError, match="not made by dynaconv"):
        dynaconv.load(tiny_checkpoint())


def test_uniform_widths_need_no_router(tiny_checkpoint: Maker) -> None:
    model, ids = dynamic_model(tiny_checkpoint(), "none"), token_ids()
    with torch.no_grad(), model.call.using(recorder=(trace := Recorder())):
        model(ids, dial=Dial.uniform(3))
        model(ids, dial=0.5)
        model(ids, dial=Dial.uniform(99))
    assert [int(w.unique()) for w in trace.widths[0]] == [3, 2, 4]


def test_stock_signature_and_class_name_survive(tiny_checkpoint: Maker) -> None:
    model = dynamic_model(tiny_checkpoint())
    assert type(model).__name__ == "LlamaForCausalLM"
    assert isinstance(model, nn.Module)
    import inspect

    assert {"input_ids", "attention_mask", "position_ids", "dial"} <= set(inspect.signature(model.forward).parameters)
