"""``torch.compile``: the whole model is one graph, at every dial, and turning the dial compiles nothing anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_models import dynamic_model, token_ids
from torch._dynamo.testing import CompileCounterWithBackend

from dynaconv import Dial

Maker = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("error::UserWarning:torch._dynamo")


@pytest.fixture(autouse=True)
def forgetful_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["width", "linear"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_one_graph_for_every_dial_of_the_model(tiny_checkpoint: Maker, family: str, kind: str) -> None:
    model, ids = dynamic_model(tiny_checkpoint(family), kind), token_ids()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for dial in (0.25, 0.3, 0.5, 0.77, 0.25):
            model.dial = dial
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 1, "the dial was compiled in"
        model.dial = 1.0
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
        model.dial = 0.5
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2, "one graph for the full dial, one for all others"


@pytest.mark.parametrize("dial", [0.25, 0.5, 1.0, [0.25, 1.0], Dial.uniform(2)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_call_may_name_its_dial(tiny_checkpoint: Maker, family: str, dial: Any) -> None:
    model, ids = dynamic_model(tiny_checkpoint(family), "linear"), token_ids()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, dial=dial).logits, model(ids, dial=dial).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["width", "linear"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_of_compiled_training(tiny_checkpoint: Maker, family: str, kind: str) -> None:
    model, ids = dynamic_model(tiny_checkpoint(family), kind).train(), token_ids()
    model.dial = 0.5
    found = []
    for run in (torch.compile(model, backend="aot_eager", fullgraph=True), model):
        model.zero_grad()
        run(ids).logits.square().mean().backward()
        found.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    compiled, plain = found
    assert compiled.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_generation_compiles_its_steps(tiny_checkpoint: Maker) -> None:
    """As transformers does by itself on a GPU: a static cache, and ``model.__call__`` compiled."""
    from transformers import CompileConfig

    model, ids = dynamic_model(tiny_checkpoint(), "linear"), token_ids()
    settings: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    compiled = model.get_compiled_call(CompileConfig(backend="aot_eager", mode=None, fullgraph=True))
    dials = [Dial(budget, prompt=budget, controlled=False) for budget in (0.25, 0.5)]
    expected = {dial: model.generate(ids, dial=dial, **settings) for dial in dials}
    assert model.at(0.25).get_compiled_call(CompileConfig(backend="aot_eager", mode=None)) is not compiled
    for dial, tokens in expected.items():
        with torch.no_grad(), model.dialed(dial):
            logits = compiled(input_ids=tokens[:, :-1]).logits
        logits[..., 0] = -torch.inf
        assert torch.equal(logits[:, 11:].argmax(-1), tokens[:, 12:])
