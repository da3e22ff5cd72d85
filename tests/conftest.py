"""Fixtures: tiny checkpoints of every family, made on the spot, and real text that is on every machine."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["OMP_NUM_THREADS"] = "1"  # child processes too: nothing is chosen by the clock
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # tests with two threads must not crawl on busy cores

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

# The same examples in every run: a change fails its own tests, not somebody else's by chance.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 257 tokens: every text round-trips, nothing is trained."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0, **{char: i + 1 for i, char in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def make_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    tied: bool = False,
    ffn: int = 96,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    hidden: int = 64,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Writes a random checkpoint of ``family`` with its tokenizer. Extra keywords go to the transformers config.

    Sizes have the same keywords for all families; see :mod:`tiny_families` for what becomes of them.
    """
    from tiny_families import tiny_settings
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab": 257, "hidden": hidden, "ffn": ffn, "layers": layers, "heads": heads, "kv_heads": kv_heads}
    sizes |= {"head_dim": head_dim, "positions": 512, "tied": tied, "scale": 0.1}
    settings = {**tiny_settings(family, sizes), **config}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=dtype)
    with torch.no_grad():  # biases and norms start at 0 and 1: draw them, so that losing one shows
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    """A folder with modules that bear the names of others and leave a file ``executed`` when one is imported."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in ("json", "numpy", "torch", "pickle", "safetensors"):
        (folder / f"{name}.py").write_text("import os\nopen(os.path.dirname(__file__) + '/executed', 'w').close()\n")
    return folder


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Makes a tiny checkpoint; see :func:`make_checkpoint`. Each call makes another folder."""
    made: list[Path] = []

    def make(family: str = "llama", **settings: Any) -> Path:
        made.append(make_checkpoint(tmp_path / f"parent-{len(made)}-{family}", family, **settings))
        return made[-1]

    return make


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 200 kB of Python source from the standard library."""
    import argparse
    import inspect
    import typing

    path = tmp_path_factory.mktemp("text") / "source.txt"
    path.write_text("\n".join(inspect.getsource(module) for module in (argparse, typing)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and text beside the checkout; tests that want it skip where it is absent."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("no ../shared beside the checkout")
    return path
