"""OLMo 2: norms behind each branch and none before it; queries and keys normalised over all heads together."""

from dynaconv.arch import parts
from dynaconv.arch.spec import Family

FAMILY = Family(
    model_type="olmo2",
    architectures=("Olmo2ForCausalLM",),
    sizes=parts.SIZES,
    tensors=(
        *parts.EMBEDDING_AND_HEAD,
        *parts.norm(f"{parts.LAYER}.post_attention_layernorm", closes=True),
        *parts.norm(f"{parts.LAYER}.post_feedforward_layernorm", closes=True),
        *parts.attention(bias="attention_bias", output_bias="attention_bias", closes=False),
        *parts.norm(f"{parts.ATTENTION}.q_norm", parts.QUERIES),
        *parts.norm(f"{parts.ATTENTION}.k_norm", parts.KEYS),
        *parts.gated_ffn(closes=False),
    ),
    ffn=parts.GATED_FFN,
    ignored=parts.ROTARY_BUFFERS,
    defaults={"hidden_act": "silu"},
)
