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
        *parts.ATTENTION_WEIGHTS,
        *parts.qkv_biases(when="attention_bias"),
        *parts.output_bias(when="attention_bias"),
        *parts.FFN_WEIGHTS,
        *parts.ffn_biases(when="mlp_bias"),
    ),
    ffn=parts.GATED_FFN,
    ignored=parts.ROTARY_BUFFERS,
)
