"""A small Llama before its first step: its sizes, its tokenizer trained on the text at hand, its random weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dynaconv.config import DataConfig
from dynaconv.data.readers import MARKER
from dynaconv.data.split import split_documents
from dynaconv.errors import DataError

TOKENIZER_CHARACTERS = 64_000_000  # more text than this no longer changes a vocabulary worth mentioning


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are the embedded base.

    Attributes:
        hidden: D, residual width.
        ffn: F, neurons of each FFN.
        layers: L.
        heads: Query heads.
        kv_heads: Key and value heads; divides ``heads``.
        vocabulary: V, tokens of the tokenizer that is trained.
        positions: Longest sequence in tokens.
        tied: The head is the embedding.
    """

    hidden: int = 128
    ffn: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 1024
    positions: int = 512
    tied: bool = True

    def problems(self) -> list[str]:
        """Everything about the sizes that cannot be."""
        sizes = {name: value for name, value in asdict(self).items() if name != "tied"}
        found = [f"{name} must be at least 1, not {value}" for name, value in sizes.items() if value < 1]
        if found:
            return found
        if self.hidden % (2 * self.heads):
            found.append(f"hidden ({self.hidden}) must be an even multiple of heads ({self.heads})")
        if self.heads % self.kv_heads:
            found.append(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
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
    """A ``LlamaForCausalLM`` of ``shape`` with weights drawn from ``seed``; torch's own random state is left alone."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    end = {"bos_token_id": 0, "eos_token_id": 0}
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=shape.tied,
        **end,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    for layer in model.model.layers:  # every layer starts as the identity: a better start for short runs
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    model.generation_config = GenerationConfig(**end, pad_token_id=0)
    return model


def training_text(data: DataConfig) -> Iterator[str]:
    """Documents of the training side of ``data``, as many as a tokenizer needs."""
    characters = 0
    for held_out, document in split_documents(data):
        if characters >= TOKENIZER_CHARACTERS:
            return
        if not held_out:
            characters += len(document.text)
            yield document.text
