"""peft's adapters on FFN and attention projections: whatever state they are in, dials compute what is right.

The truth is a stock model with the same adapters, whose unused neurons are put to zero by hooks; with routers, a
dynamic model whose weights have the adapters in them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_models import dynamic_model, masked_neurons, token_ids
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from dynaconv import Dial
from dynaconv.arch.registry import known_families

Maker = Callable[..., Path]
ATTENTION = {"llama": "q_proj", "phi3": "qkv_proj", "gpt2": "c_attn", "opt": "q_proj"}
FAMILIES = list(ATTENTION)
WIDTHS = (0, 1, 3)
every_family = pytest.mark.parametrize("family", FAMILIES)
before_or_after = pytest.mark.parametrize("first", ["adapters first", "dynamic first"])


def targets(family: str, where: str) -> list[str]:
    ffn = known_families()[family].ffn
    projections = [name for name in dict.fromkeys((ffn.gate, ffn.up, ffn.down)) if name]
    return {"ffn": projections, "attention": [ATTENTION[family]], "up": [ffn.up], "down": [ffn.down]}[where]


def adapted(model: Any, family: str, where: str = "ffn", **settings: Any) -> Any:
    """``model`` with a LoRA adapter whose weights are drawn by their names, the same for every model."""
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=targets(family, where), **settings))
    draw(wrapped)
    return wrapped.eval()


def draw(wrapped: Any) -> None:
    """Opinionated adapter weights."""
    with torch.no_grad():
        for name, parameter in sorted(wrapped.named_parameters()):
            short = name.removeprefix("base_model.model.")
            if "lora_magnitude" in name:
                parameter.mul_(1.5)
            elif "lora_" in name:
                generator = torch.Generator().manual_seed(sum(map(ord, short)) * 7 + parameter.numel())
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def both(folder: Path, family: str, first: str, kind: str = "none", **settings: Any) -> tuple[Any, Any]:
    """A dynamic model and a stock one with the same adapters."""
    stock = adapted(AutoModelForCausalLM.from_pretrained(folder), family, **settings)
    if first == "dynamic first":
        return adapted(dynamic_model(folder, kind), family, **settings), stock
    wrapped = adapted(AutoModelForCausalLM.from_pretrained(folder), family, **settings)
    dynamic_model(folder, kind, stock=wrapped.base_model.model)
    return wrapped.eval(), stock


def truth(stock: Any, family: str, edge: int, ids: Tensor) -> Tensor:
    """A stock model with adapters, of whose FFNs only the neurons before ``edge`` are left."""
    with masked_neurons(stock.base_model.model, family, range(edge)):
        logits: Tensor = stock(input_ids=ids).logits
    return logits


def compare(dynamic: Any, stock: Any, family: str) -> Tensor:
    """At every width, with gradients and without; returns logits."""
    ids, found = token_ids(), []
    for width in WIDTHS:
        edge = dynamic.base_model.model.layout.partition.edges[width]
        expected = truth(stock, family, edge, ids).detach()
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                logits = dynamic(input_ids=ids, dial=Dial.uniform(width)).logits.detach()
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        found.append(logits)
    return torch.stack(found)


@before_or_after
@pytest.mark.parametrize("where", ["ffn", "attention", "up", "down"])
@every_family
def test_every_state_of_an_adapter(tiny_checkpoint: Maker, family: str, where: str, first: str) -> None:
    folder = tiny_checkpoint(family)
    dynamic, stock = both(folder, family, first, where=where)
    active = compare(dynamic, stock, family)
    with dynamic.disable_adapter(), stock.disable_adapter():
        off = compare(dynamic, stock, family)
    base, ids = dynamic_model(folder, "none"), token_ids()
    with torch.no_grad():
        plain = torch.stack([base(ids, dial=Dial.uniform(width)).logits for width in WIDTHS])
    torch.testing.assert_close(off, plain, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(active, off, atol=1e-2), "the adapter must matter here"
    dynamic.merge_adapter()
    torch.testing.assert_close(compare(dynamic, stock, family), active, rtol=1e-4, atol=1e-3)
    with dynamic.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(compare(dynamic, stock, family), plain, rtol=1e-4, atol=1e-3)
    dynamic.unmerge_adapter() if any(layer.merged for layer in lora_layers(dynamic)) else None
    torch.testing.assert_close(compare(dynamic, stock, family), active, rtol=1e-4, atol=1e-3)


def lora_layers(wrapped: Any) -> list[Any]:
    return [module for module in wrapped.modules() if hasattr(module, "merged") and hasattr(module, "lora_A")]


@before_or_after
@every_family
def test_two_adapters(tiny_checkpoint: Maker, family: str, first: str) -> None:
    dynamic, stock = both(tiny_checkpoint(family), family, first)
    seen = []
    for wrapped in (dynamic, stock):
        wrapped.add_adapter("second", LoraConfig(r=2, target_modules=targets(family, "up")))
        draw(wrapped)
    for active in ("default", "second", ["default", "second"]):
        for wrapped in (dynamic, stock):
            wrapped.base_model.set_adapter(active)
        seen.append(compare(dynamic, stock, family))
    assert not any(torch.allclose(a, b, atol=1e-2) for a, b in pairwise(seen))
    dynamic.merge_adapter()
    torch.testing.assert_close(compare(dynamic, stock, family), seen[-1], rtol=1e-4, atol=1e-3)


@before_or_after
@every_family
def test_dora(tiny_checkpoint: Maker, family: str, first: str) -> None:
    """Its magnitudes are not part of what an adapter adds to a weight."""
    dynamic, stock = both(tiny_checkpoint(family), family, first, use_dora=True)
    active = compare(dynamic, stock, family)
    dynamic.merge_adapter()
    torch.testing.assert_close(compare(dynamic, stock, family), active, rtol=1e-4, atol=1e-3)


@before_or_after
@every_family
def test_gradients_of_adapters(tiny_checkpoint: Maker, family: str, first: str) -> None:
    dynamic, stock = both(tiny_checkpoint(family), family, first)
    ids, inner = token_ids(), dynamic.base_model.model
    with masked_neurons(stock.base_model.model, family, range(inner.layout.partition.edges[2])):
        stock(input_ids=ids, labels=ids).loss.backward()
    dynamic(input_ids=ids, labels=ids, dial=Dial.uniform(2)).loss.backward()
    theirs = {name: one.grad for name, one in stock.named_parameters() if one.grad is not None}
    ours = {name: one.grad for name, one in dynamic.named_parameters() if one.grad is not None}
    assert len(theirs) > 0
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max() + 1e-9))
    assert not any(bool(ours[name].any()) for name in ours.keys() - theirs.keys())


@before_or_after
@pytest.mark.parametrize("kind", ["width", "linear"])
@every_family
def test_routers_see_what_a_model_with_merged_weights_sees(
    tiny_checkpoint: Maker, family: str, kind: str, first: str
) -> None:
    folder, ids = tiny_checkpoint(family), token_ids()
    dynamic, stock = both(folder, family, first, kind=kind)
    merged = dynamic_model(folder, kind, stock=stock.merge_and_unload())
    assert all(ffn.is_plain() for ffn in merged.ffns()), "this one is to run the kernels"
    with torch.no_grad():
        for dial in (0.25, 0.5, [0.25, 0.5], 1.0):
            expected = merged(ids, dial=dial).logits
            found = dynamic(input_ids=ids, dial=dial).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    inner = dynamic.base_model.model
    settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected_tokens = merged.generate(ids, dial=0.25, **settings)
    assert torch.equal(dynamic.generate(input_ids=ids, dial=0.25, **settings), expected_tokens)
    unloaded = dynamic.merge_and_unload()
    assert unloaded is inner
    assert first == "adapters first" or all(ffn.is_plain() for ffn in unloaded.ffns())
    with torch.no_grad():
        torch.testing.assert_close(unloaded(ids, dial=0.5).logits, merged(ids, dial=0.5).logits, rtol=1e-4, atol=1e-3)
