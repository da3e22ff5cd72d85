"""Rows that most families share, so that a family file shows only what is its own."""

from __future__ import annotations

from dynaconv.arch.spec import FFNSpec, Size, TensorSpec

LAYER = "model.layers.{layer}"
ATTENTION = f"{LAYER}.self_attn"
FFN = f"{LAYER}.mlp"

SIZES = {
    "vocab": Size("vocab_size"),
    "residual": Size("hidden_size"),
    "ffn": Size("intermediate_size"),
    "q_head": Size("num_attention_heads"),
    "kv_head": Size("num_key_value_heads", otherwise="q_head"),
    "head_dim": Size("head_dim", otherwise="residual/q_head"),
}

EMBEDDING_AND_HEAD = (
    TensorSpec("model.embed_tokens.weight", ("vocab", "residual"), "embedding"),
    TensorSpec("model.norm.weight", ("residual",), "norm"),
    TensorSpec("lm_head.weight", ("vocab", "residual"), "head"),
)

PRE_NORMS = (
    TensorSpec(f"{LAYER}.input_layernorm.weight", ("residual",), "norm"),
    TensorSpec(f"{LAYER}.post_attention_layernorm.weight", ("residual",), "norm"),
)

ATTENTION_WEIGHTS = (
    TensorSpec(f"{ATTENTION}.q_proj.weight", ("q_head*head_dim", "residual"), "attention"),
    TensorSpec(f"{ATTENTION}.k_proj.weight", ("kv_head*head_dim", "residual"), "attention"),
    TensorSpec(f"{ATTENTION}.v_proj.weight", ("kv_head*head_dim", "residual"), "attention"),
    TensorSpec(f"{ATTENTION}.o_proj.weight", ("residual", "q_head*head_dim"), "attention"),
)

FFN_WEIGHTS = (
    TensorSpec(f"{FFN}.gate_proj.weight", ("ffn", "residual"), "ffn"),
    TensorSpec(f"{FFN}.up_proj.weight", ("ffn", "residual"), "ffn"),
    TensorSpec(f"{FFN}.down_proj.weight", ("residual", "ffn"), "ffn"),
)

GATED_FFN = FFNSpec(FFN, gate="gate_proj", up="up_proj", down="down_proj", activation="hidden_act")

# Checkpoints converted by early transformers versions stored the rotary frequencies, which every model recomputes.
ROTARY_BUFFERS = ("model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")


def qkv_biases(when: str | None = None) -> tuple[TensorSpec, ...]:
    """Biases of the query, key and value projections, always or when the field ``when`` of the config is true."""
    return (
        TensorSpec(f"{ATTENTION}.q_proj.bias", ("q_head*head_dim",), "attention", when),
        TensorSpec(f"{ATTENTION}.k_proj.bias", ("kv_head*head_dim",), "attention", when),
        TensorSpec(f"{ATTENTION}.v_proj.bias", ("kv_head*head_dim",), "attention", when),
    )


def output_bias(when: str | None = None) -> tuple[TensorSpec, ...]:
    """Bias of the attention's output projection."""
    return (TensorSpec(f"{ATTENTION}.o_proj.bias", ("residual",), "attention", when),)


def ffn_biases(when: str | None = None) -> tuple[TensorSpec, ...]:
    """Biases of the three FFN projections."""
    return (
        TensorSpec(f"{FFN}.gate_proj.bias", ("ffn",), "ffn", when),
        TensorSpec(f"{FFN}.up_proj.bias", ("ffn",), "ffn", when),
        TensorSpec(f"{FFN}.down_proj.bias", ("residual",), "ffn", when),
    )
