"""Dynamic models pickle, are saved by ``torch.save``, copied, and sent to other processes, dial and all."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_models import dynamic_model, neurons_model, token_ids
from tiny_families import FAMILIES

from dynaconv import Dial

Maker = Callable[..., Path]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To the last digits: memory that is aligned otherwise is added up in another order."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def torch_saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def made(folder: Path, family: str) -> Any:
    """Of single neurons in some families, of blocks in others."""
    if family in ("gemma2", "gpt2", "phi3", "qwen3"):
        return neurons_model(folder)
    return dynamic_model(folder, "linear" if family in ("llama", "opt") else "width")


@pytest.mark.parametrize("how", [pickled, torch_saved, copy.deepcopy])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_the_same_model_and_stands_alone(
    tiny_checkpoint: Maker, family: str, how: Callable[[Any], Any]
) -> None:
    model, ids = made(tiny_checkpoint(family, tied=True), family), token_ids()
    model.dial = 0.5
    with torch.no_grad():
        expected, low = model(ids).logits, model(ids, dial=0.25).logits
        again = how(model)
        assert type(again) is type(model)
        assert again.dial == Dial(0.5)
        assert again.layout == model.layout
        assert all(ffn.call is again.call is not model.call for ffn in again.ffns())
        close(again(ids).logits, expected)
        close(again(ids, dial=0.25).logits, low)
        again.dial = 0.25
        close(again(ids).logits, low)
        assert torch.equal(model(ids).logits, expected), "a copy turns the dial of the original"
        for parameter in again.parameters():
            parameter.zero_()
        assert torch.equal(model(ids).logits, expected), "a copy shares weights with the original"
    for ffn in again.ffns():
        assert ffn.in_one_piece() == next(iter(model.ffns())).in_one_piece()


def test_a_view_pickles_at_its_own_dial(tiny_checkpoint: Maker) -> None:
    model, ids = dynamic_model(tiny_checkpoint()), token_ids()
    again = pickled(model.at(0.25))
    with torch.no_grad():
        close(again(ids).logits, model(ids, dial=0.25).logits)


def answer(model: Any, ids: torch.Tensor, pipe: Any) -> None:
    """Runs in another process, where nothing but the model has come along."""
    torch.set_num_threads(1)
    with torch.no_grad():
        plain = model(ids).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)(ids).logits
    pipe.send((plain.tolist(), compiled.tolist()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_another_process_gives_the_same_answer_compiled_or_not(tiny_checkpoint: Maker, family: str) -> None:
    model, ids = made(tiny_checkpoint(family), family), token_ids()
    model.dial = 0.5
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=answer, args=(model, ids, there))
    process.start()
    there.close()
    try:
        plain, compiled = here.recv()
    finally:
        process.join()
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(torch.tensor(plain), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(compiled), expected, rtol=0, atol=1e-5)
