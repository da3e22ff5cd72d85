"""Rows that most families share, so that a family file shows only what is its own."""

from __future__ import annotations

from dynaconv.arch.spec import FFNSpec, Size, TensorSpec

LAYER = "model.layers.{layer}"
ATTENTION = f"{LAYER}.self_attn"
FFN = f"{LAYER}.mlp"

HEAD_DIM = Size("head_dim", otherwise="residual/q_head")
SIZES = {
    "vocab": Size("vocab_size"),
    "residual": Size("hidden_size"),
    "ffn": Size("intermediate_size"),
    "q_head": Size("num_attention_heads"),
    "kv_head": Size("num_key_value_heads", otherwise="q_head"),
    "q_dim": HEAD_DIM,
    "k_dim": HEAD_DIM,
    "v_dim": HEAD_DIM,
}

QUERIES, KEYS, VALUES, ATTENDED = "q_head*q_dim", "kv_head*k_dim", "kv_head*v_dim", "q_head*v_dim"

GATED_FFN = FFNSpec(FFN, gate="gate_proj", up="up_proj", down="down_proj", activation="hidden_act")

# Checkpoints converted by early transformers versions stored the rotary frequencies, which every model recomputes.
ROTARY_BUFFERS = ("model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")

Bias = bool | str


def derived_head_dim(residual: str, heads: str) -> dict[str, Size]:
    """Sizes of a family without grouped queries whose heads make up the residual stream.

    Args:
        residual: Field of ``config.json`` with D.
        heads: Field with the number of heads.
    """
    dim = Size(None, otherwise="residual/q_head")
    return {"residual": Size(residual), "q_head": Size(heads), "q_dim": dim, "k_dim": dim, "v_dim": dim}


def linear(
    name: str, produced: str, contracted: str, part: str, *, bias: Bias = False, closes: bool = False
) -> tuple[TensorSpec, ...]:
    """An ``nn.Linear``: weight (produced, contracted), and a bias always, never, or when a field of the config says."""
    weight = TensorSpec(f"{name}.weight", (produced, contracted), part, contracts=1, closes=closes)
    return (weight, *_bias(name, produced, part, bias, closes=closes))


def conv1d(name: str, produced: str, contracted: str, part: str, *, closes: bool = False) -> tuple[TensorSpec, ...]:
    """A ``Conv1D`` of GPT-2: weight (contracted, produced), and a bias."""
    weight = TensorSpec(f"{name}.weight", (contracted, produced), part, contracts=0, closes=closes)
    return (weight, *_bias(name, produced, part, True, closes=closes))


def _bias(name: str, produced: str, part: str, bias: Bias, *, closes: bool) -> tuple[TensorSpec, ...]:
    when = bias if isinstance(bias, str) else None
    return (TensorSpec(f"{name}.bias", (produced,), part, when, closes=closes),) if bias else ()


def norm(
    name: str, axis: str = "residual", *, bias: bool = False, offset: float = 0.0, closes: bool = False
) -> tuple[TensorSpec, ...]:
    """A normalisation over ``axis``: RMSNorm, or LayerNorm with its bias."""
    weight = TensorSpec(f"{name}.weight", (axis,), "norm", offset=offset, closes=closes)
    return (weight, TensorSpec(f"{name}.bias", (axis,), "norm", closes=closes)) if bias else (weight,)


def embedding(name: str, axis: str = "vocab", part: str = "embedding") -> tuple[TensorSpec, ...]:
    """A table of tokens or positions."""
    return (TensorSpec(f"{name}.weight", (axis, "residual"), part),)


def head(name: str = "lm_head") -> tuple[TensorSpec, ...]:
    """The output head."""
    return linear(name, "vocab", "residual", "head")


def attention(*, bias: Bias = False, output_bias: Bias = False, closes: bool = True) -> tuple[TensorSpec, ...]:
    """Queries, keys, values and the output projection, each a tensor of its own.

    Args:
        bias: Whether queries, keys and values have biases.
        output_bias: Whether the output projection has one.
        closes: Whether the output projection ends the branch; a norm behind it does otherwise.
    """
    return (
        *linear(f"{ATTENTION}.q_proj", QUERIES, "residual", "attention", bias=bias),
        *linear(f"{ATTENTION}.k_proj", KEYS, "residual", "attention", bias=bias),
        *linear(f"{ATTENTION}.v_proj", VALUES, "residual", "attention", bias=bias),
        *linear(f"{ATTENTION}.o_proj", "residual", ATTENDED, "attention", bias=output_bias, closes=closes),
    )


def gated_ffn(*, bias: Bias = False, closes: bool = True) -> tuple[TensorSpec, ...]:
    """Gate, up and down projection, as :data:`GATED_FFN` names them."""
    return (
        *linear(f"{FFN}.gate_proj", "ffn", "residual", "ffn", bias=bias),
        *linear(f"{FFN}.up_proj", "ffn", "residual", "ffn", bias=bias),
        *linear(f"{FFN}.down_proj", "residual", "ffn", "ffn", bias=bias, closes=closes),
    )


EMBEDDING_AND_HEAD = (*embedding("model.embed_tokens"), *norm("model.norm"), *head())
PRE_NORMS = (*norm(f"{LAYER}.input_layernorm"), *norm(f"{LAYER}.post_attention_layernorm"))
