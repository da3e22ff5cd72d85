"""accelerate's hooks, put on before or after a model becomes dynamic: dials are obeyed, and routers have memory.

``device_map`` over several devices, or with offloading, puts its hooks on before. All of it on one CPU here: what an
offloaded module computes with is not there between its calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from dynamic_models import dynamic_model, neurons_model, token_ids
from transformers import AutoModelForCausalLM

import dynaconv
from dynaconv import Dial
from dynaconv.dynamic.layout import CopyLayout
from dynaconv.dynamic.recorder import Recorder

Maker = Callable[..., Path]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
HOOKS: dict[str, Callable[[Any, Path], Any]] = {
    "dispatched": lambda model, _: dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True),
    "offloaded to memory": lambda model, _: cpu_offload(model, torch.device("cpu"), offload_buffers=False),
    "offloaded to disk": lambda model, folder: disk_offload(model, str(folder), torch.device("cpu")),
}
every_hook = pytest.mark.parametrize("hooks", HOOKS)
FAMILIES = ["llama", "phi3", "gpt2", "opt"]


def made(folder: Path, kind: str, **settings: Any) -> Any:
    """A dynamic model with routers of ``kind``; ``sketch`` over single neurons."""
    copy = CopyLayout(4, 32, values=False)
    return neurons_model(folder, copy=copy, **settings) if kind == "sketch" else dynamic_model(folder, kind, **settings)


def check(hooked: Any, plain: Any) -> None:
    """They compute the same at every dial, asked for in every way."""
    ids = token_ids(2, 9)
    with torch.no_grad():
        for dial in (0.25, 0.5, [0.5, 0.25], 1.0, Dial.uniform(1)):
            expected = plain(ids, dial=dial).logits
            torch.testing.assert_close(hooked(ids, dial=dial).logits, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(hooked.forward(ids, dial=dial).logits, expected, rtol=1e-5, atol=1e-5)
        hooked.dial = plain.dial = 0.25
        expected = plain(ids).logits
        assert not torch.allclose(expected, plain(ids, dial=1.0).logits, atol=1e-3), "the dial must matter here"
        for forward in (hooked, hooked.forward, hooked.at(0.25)):
            torch.testing.assert_close(forward(ids).logits, expected, rtol=1e-5, atol=1e-5)
    for dial in (0.5, None, [0.25, 1.0]):
        assert torch.equal(hooked.generate(ids, dial=dial, **GREEDY), plain.generate(ids, dial=dial, **GREEDY))
    shares, expected_shares = Recorder(), Recorder()
    with hooked.call.using(recorder=shares), plain.call.using(recorder=expected_shares):
        hooked.generate(ids, dial=0.5, **GREEDY)
        plain.generate(ids, dial=0.5, **GREEDY)
    assert torch.equal(shares.all_shares(), expected_shares.all_shares())


@every_hook
@pytest.mark.parametrize("kind", ["width", "linear", "sketch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_before_it_is_dynamic(tiny_checkpoint: Maker, tmp_path: Path, family: str, kind: str, hooks: str) -> None:
    folder = tiny_checkpoint(family)
    stock = HOOKS[hooks](AutoModelForCausalLM.from_pretrained(folder).eval(), tmp_path / "offload")
    model = made(folder, kind, stock=stock)
    assert {one.device.type for ffn in model.ffns() for one in ffn.own_state().values()} == {"cpu"}
    check(model, made(folder, kind))


@every_hook
@pytest.mark.parametrize("kind", ["width", "sketch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_on_a_dynamic_model(tiny_checkpoint: Maker, tmp_path: Path, family: str, kind: str, hooks: str) -> None:
    folder = tiny_checkpoint(family)
    check(HOOKS[hooks](made(folder, kind), tmp_path / "offload"), made(folder, kind))


@pytest.mark.parametrize("kind", ["width", "sketch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_device_map_when_loading(tiny_checkpoint: Maker, tmp_path: Path, family: str, kind: str) -> None:
    """The second decoder layer lies on disk."""
    made(tiny_checkpoint(family), kind).save_pretrained(tmp_path / "saved")
    plain = dynaconv.load(tmp_path / "saved").eval()
    last = plain.layout.ffn.path.format(layer=1).removesuffix(".mlp")
    owner, _, _ = last.rpartition(".")
    parts = {name: "cpu" for name, _ in plain.get_submodule(owner.rpartition(".")[0]).named_children()}
    prefix = owner.rpartition(".")[0]
    device_map = {f"{prefix}.{name}": "cpu" for name in parts if f"{prefix}.{name}" != owner}
    device_map |= {f"{owner}.0": "cpu", f"{owner}.1": "disk", "lm_head": "cpu"}
    model = dynaconv.load(tmp_path / "saved", device_map=device_map, offload_folder=str(tmp_path / "offload")).eval()
    assert any(parameter.device.type == "meta" for parameter in model.parameters()), "nothing was offloaded"
    assert {one.device.type for ffn in model.ffns() for one in ffn.own_state().values()} == {"cpu"}
    check(model, plain)


@every_hook
@pytest.mark.parametrize("family", FAMILIES)
def test_low_bit_values_give_way_to_exact_ones(tiny_checkpoint: Maker, tmp_path: Path, family: str, hooks: str) -> None:
    """What modules with hooks compute; the same neurons are on, and nothing is encoded anew for each call."""
    folder, ids = tiny_checkpoint(family), token_ids(2, 9)
    stock = HOOKS[hooks](AutoModelForCausalLM.from_pretrained(folder).eval(), tmp_path / "offload")
    hooked, plain = neurons_model(folder, stock=stock), neurons_model(folder)
    dial = plain.layout.dial
    plain.layout = replace(plain.layout, dial=replace(dial, exact=dial.thresholds))
    with torch.no_grad():
        for budget in (0.25, 0.5):
            torch.testing.assert_close(hooked(ids, dial=budget).logits, plain(ids, dial=budget).logits)
        made_first = [ffn.copy.first(torch.float32) for ffn in hooked.ffns()]
        hooked(ids, dial=0.5)
    assert all(ffn.copy.first(torch.float32) is one for ffn, one in zip(hooked.ffns(), made_first, strict=True))
