"""A small language model before its first step: its sizes, a tokenizer trained on its text, random weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dynaconv.config import DataConfig
from dynaconv.data.readers import MARKER
from dynaconv.data.split import split_documents
from dynaconv.errors import DataError

FAMILIES = ("llama", "qwen3", "gpt2", "opt")
UNGATED = ("gpt2", "opt")
LAST = ("o_proj.weight", "out_proj.weight", "c_proj.weight", "down_proj.weight", "fc2.weight")
"""Matrices that end the attention and the FFN of a layer, whatever the family."""
TOKENIZER_CHARACTERS = 64_000_000  # more text than this no longer changes a vocabulary worth mentioning


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are the embedded base.

    Attributes:
        hidden: D, residual width.
        ffn: F, neurons of each FFN.
        layers: L.
        heads: Query heads.
        kv_heads: Key and value heads; divides ``heads``. As many as these where FFNs have no gate.
        vocabulary: V, tokens of the tokenizer that is trained.
        positions: Longest sequence in tokens.
        tied: The head is the embedding.
        family: What the model is; FFNs of ``gpt2`` (GELU) and ``opt`` (ReLU) have no gate.
    """

    hidden: int = 128
    ffn: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 1024
    positions: int = 512
    tied: bool = True
    family: str = "llama"

    def problems(self) -> list[str]:
        """Everything about the sizes that cannot be."""
        if self.family not in FAMILIES:
            return [f"family must be one of {', '.join(FAMILIES)}, not {self.family!r}"]
        sizes = {name: value for name, value in asdict(self).items() if name not in ("tied", "family")}
        found = [f"{name} must be at least 1, not {value}" for name, value in sizes.items() if value < 1]
        if found:
            return found
        if self.hidden % (2 * self.heads):
            found.append(f"hidden ({self.hidden}) must be an even multiple of heads ({self.heads})")
        if self.heads % self.kv_heads:
            found.append(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.family in UNGATED and self.kv_heads != self.heads:
            found.append(f"kv_heads ({self.kv_heads}) must be heads ({self.heads}): {self.family} shares none")
        if self.vocabulary < 257:
            found.append(f"vocabulary ({self.vocabulary}) must hold 256 bytes and the end of text")
        return found


def train_tokenizer(data: DataConfig, shape: Shape) -> Any:
    """A byte-level BPE tokenizer trained on the training side of ``data``; every text round-trips.

    Raises:
        DataError: There is too little text for so many tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        special_tokens=[MARKER],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(data), trainer)
    if tokenizer.get_vocab_size() != shape.vocabulary:
        raise DataError(
            "too little text for a vocabulary of this size",
            where=f"data={','.join(data.train)}",
            expected=f"{shape.vocabulary} tokens",
            found=f"{tokenizer.get_vocab_size()} tokens",
            hint="ask for a smaller vocabulary or give more text",
        )
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), MARKER)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=shape.positions, **special)


def build(shape: Shape, seed: int) -> Any:
    """A model of ``shape`` with weights drawn from ``seed``; torch's own random state is left alone."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_config(shape))
    for name, parameter in model.named_parameters():
        if name.endswith(LAST):  # every layer starts as the identity: a better start for short runs
            torch.nn.init.zeros_(parameter)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return model


def _config(shape: Shape) -> Any:
    """The ``config.json`` of ``shape``. No token is padding: its embedding would not be trained."""
    from transformers import AutoConfig

    common = {
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    if shape.family == "gpt2":
        sizes = {"n_embd": shape.hidden, "n_inner": shape.ffn, "n_layer": shape.layers, "n_head": shape.heads}
        off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return AutoConfig.for_model("gpt2", **common, **sizes, **off, n_positions=shape.positions)
    common |= {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.positions,
    }
    if shape.family == "opt":
        sizes = {"ffn_dim": shape.ffn, "word_embed_proj_dim": shape.hidden}
        return AutoConfig.for_model("opt", **common, **sizes, dropout=0.0)
    sizes = {"intermediate_size": shape.ffn, "num_key_value_heads": shape.kv_heads}
    if shape.family == "qwen3":
        sizes["head_dim"] = shape.hidden // shape.heads
    return AutoConfig.for_model(shape.family, **common, **sizes)


def training_text(data: DataConfig) -> Iterator[str]:
    """Documents of the training side of ``data``, as many as a tokenizer needs."""
    characters = 0
    for held_out, document in split_documents(data):
        if characters >= TOKENIZER_CHARACTERS:
            return
        if not held_out:
            characters += len(document.text)
            yield document.text
