"""What a tiny model of each family needs: the names of its sizes, and settings without which its quirks would not show.

A family whose ``config.json`` looks like Llama's needs no entry. Tests that take ``FAMILIES`` run for every family that
dynaconv knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dynaconv.arch.registry import known_families

FAMILIES = tuple(known_families())

NAMES = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "positions": "max_position_embeddings",
    "tied": "tie_word_embeddings",
    "scale": "initializer_range",
}


@dataclass(frozen=True)
class Tiny:
    """How a tiny config of a family differs from one of Llama's.

    Attributes:
        names: Its fields by the names of ``NAMES``; ``None`` where it has no such field.
        head_dim: Set where nobody asks for another one.
        settings: What else its config gets.
    """

    names: Mapping[str, str | None] = field(default_factory=dict)
    head_dim: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


# Windows are shorter than the tests' texts, caps and factors far from doing nothing, and no size is another's default.
TINY = {
    "gemma2": Tiny(
        head_dim=24,
        settings={
            "query_pre_attn_scalar": 20,
            "sliding_window": 7,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "gemma3_text": Tiny(
        head_dim=24, settings={"query_pre_attn_scalar": 20, "sliding_window": 7, "sliding_window_pattern": 2}
    ),
    "gpt2": Tiny(
        names={
            "hidden": "n_embd",
            "ffn": "n_inner",
            "layers": "n_layer",
            "heads": "n_head",
            "kv_heads": None,
            "head_dim": None,
            "positions": "n_positions",
        },
        settings={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "gpt_neox": Tiny(names={"kv_heads": None, "head_dim": None}),
    "granite": Tiny(
        settings={
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.2,
        }
    ),
    "opt": Tiny(
        names={"ffn": "ffn_dim", "kv_heads": None, "head_dim": None, "scale": "init_std"}, settings={"dropout": 0.0}
    ),
}


def tiny_settings(family: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The transformers config of a tiny model of ``family``.

    Args:
        family: Its ``model_type``.
        sizes: By the names of ``NAMES``; ``None`` for what is left to the family. ``kv_heads`` is ignored where the
            family has no grouped queries.

    Raises:
        ValueError: A ``head_dim`` is asked for that the family cannot have.
    """
    tiny = TINY.get(family, Tiny())
    names = {**NAMES, **tiny.names}
    head_dim = tiny.head_dim if sizes.get("head_dim") is None else sizes["head_dim"]
    if head_dim is not None and names["head_dim"] is None and head_dim * sizes["heads"] != sizes["hidden"]:
        raise ValueError(f"{family} has no head_dim of its own: hidden {sizes['hidden']} over heads {sizes['heads']}")
    settings: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, **tiny.settings}
    for name, value in {**sizes, "head_dim": head_dim}.items():
        config_field = names[name]
        if config_field is not None and value is not None:
            settings[config_field] = value
    return settings
