"""Gemma 2: norms around each branch that multiply with 1 + w, embeddings times sqrt(D), capped scores and logits."""

from dynaconv.arch import parts
from dynaconv.arch.spec import Family, FFNSpec, Size

HEAD_DIM = Size("head_dim", otherwise=256)

FAMILY = Family(
    model_type="gemma2",
    architectures=("Gemma2ForCausalLM",),
    sizes={
        **parts.SIZES,
        "kv_head": Size("num_key_value_heads", otherwise=4),
        "q_dim": HEAD_DIM,
        "k_dim": HEAD_DIM,
        "v_dim": HEAD_DIM,
    },
    tensors=(
        *parts.embedding("model.embed_tokens"),
        *parts.norm("model.norm", offset=1),
        *parts.head(),
        *parts.norm(f"{parts.LAYER}.input_layernorm", offset=1),
        *parts.norm(f"{parts.LAYER}.post_attention_layernorm", offset=1, closes=True),
        *parts.norm(f"{parts.LAYER}.pre_feedforward_layernorm", offset=1),
        *parts.norm(f"{parts.LAYER}.post_feedforward_layernorm", offset=1, closes=True),
        *parts.attention(bias="attention_bias", output_bias="attention_bias", closes=False),
        *parts.gated_ffn(closes=False),
    ),
    ffn=FFNSpec(parts.FFN, gate="gate_proj", up="up_proj", down="down_proj", activation="hidden_activation"),
    ignored=parts.ROTARY_BUFFERS,
    defaults={
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
    },
    attention_scale="query_pre_attn_scalar",
    embedding_scaled=True,
)
