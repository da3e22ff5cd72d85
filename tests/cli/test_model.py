"""``eval`` and ``generate``: a converted model at a point of its dial, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_full_dial_scores_as_the_stock_model_does(dynaconv: Callable, converted: Path, text_file: Path) -> None:
    arguments = ("--data", text_file, "data.sequence_length=32", "--tokens", 2048, "--json")
    full = json.loads(dynaconv("eval", converted, "--dial", "full", *arguments).out)
    low = json.loads(dynaconv("eval", converted, "--dial", 0.25, *arguments).out)
    assert full["active_share"] == 1.0
    assert 0 < full["tokens"] <= 2048
    assert low["active_share"] < 0.5
    assert low["loss"] != full["loss"]
    again = json.loads(dynaconv("eval", converted / "05-export", "--dial", 1, *arguments).out)
    assert again == full


def test_a_dense_checkpoint_is_scored_too(dynaconv: Callable, dense: Path, text_file: Path) -> None:
    ran = dynaconv("eval", dense, "--data", text_file, "data.sequence_length=32", "--tokens", 2048)
    assert ran.code == 0, ran.err
    assert "perplexity" in ran.out


def test_generate_writes_what_the_stock_model_would(dynaconv: Callable, converted: Path) -> None:
    folder = converted / "05-export"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("def main", return_tensors="pt")
    stock = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        ids = stock.generate(inputs["input_ids"], max_new_tokens=8, do_sample=False, pad_token_id=0)
    ran = dynaconv("generate", converted, "--prompt", "def main", "--dial", "full", "--max-new-tokens", 8)
    assert ran.out.rstrip("\n") == tokenizer.decode(ids[0], skip_special_tokens=True).rstrip("\n")
    assert ran.err == ""


def test_generate_at_a_low_dial(dynaconv: Callable, converted: Path) -> None:
    ran = dynaconv("generate", converted, "--prompt", "def main", "--dial", 0.25, "--max-new-tokens", 8)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("def main")


@pytest.mark.parametrize(
    ("dial", "code", "said"),
    [
        ("0", 2, "above 0 and at most 1"),
        ("1.5", 2, "above 0 and at most 1"),
        ("half", 2, "above 0 and at most 1"),
        ("nan", 2, "above 0 and at most 1"),
        ("0.01", 4, "budget 0.01 is below the lowest that was measured"),
        ("0.01", 4, "0.25 or more"),
    ],
)
def test_a_dial_that_cannot_be_followed(dynaconv: Callable, converted: Path, dial: str, code: int, said: str) -> None:
    for command in (["generate", "--prompt", "x"], ["eval", "--data", "python-stdlib"]):
        ran = dynaconv(command[0], converted, *command[1:], "--dial", dial)
        assert (ran.code, ran.out) == (code, "")
        assert said in ran.err


def test_what_cannot_be_used(dynaconv: Callable, converted: Path, tmp_path: Path) -> None:
    uncalibrated = dynaconv("generate", converted / "02-carve", "--prompt", "x", "--dial", 0.5)
    assert uncalibrated.code == 3
    assert "no calibrated dial" in uncalibrated.err
    assert dynaconv("generate", tmp_path / "absent", "--prompt", "x").code == 3
    assert dynaconv("eval", tmp_path, "--data", "python-stdlib").code == 3
    assert dynaconv("eval", converted, "--data", tmp_path / "absent.txt").code == 2
    assert dynaconv("eval", converted, "--data", "python-stdlib", "data.fields=x").code == 2
    assert dynaconv("generate", converted, "--prompt", "").code == 2


@pytest.mark.parametrize("name", ["model.safetensors", "dynaconv.safetensors"])
def test_a_damaged_model_gets_one_clear_message(
    dynaconv: Callable, converted: Path, tmp_path: Path, text_file: Path, name: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(converted / "05-export", model)
    content = (model / name).read_bytes()
    (model / name).write_bytes(content[: len(content) // 2])
    for command in (["generate", "--prompt", "x"], ["eval", "--data", str(text_file)]):
        ran = dynaconv(command[0], model, *command[1:])
        assert (ran.code, ran.out) == (3, "")
        assert name in ran.err
    (model / name).unlink()
    assert dynaconv("generate", model, "--prompt", "x").code == 3
