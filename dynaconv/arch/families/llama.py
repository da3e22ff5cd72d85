"""Llama 1 to 3 and the many models saved as one (Yi, TinyLlama, SmolLM, ...)."""

from dynaconv.arch import parts
from dynaconv.arch.spec import Family

FAMILY = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    sizes=parts.SIZES,
    tensors=(
        *parts.EMBEDDING_AND_HEAD,
        *parts.PRE_NORMS,
        *parts.attention(bias="attention_bias", output_bias="attention_bias"),
        *parts.gated_ffn(bias="mlp_bias"),
    ),
    ffn=parts.GATED_FFN,
    ignored=parts.ROTARY_BUFFERS,
    defaults={"hidden_act": "silu"},
)
