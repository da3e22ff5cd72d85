"""Qwen 1.5, 2 and 2.5: biases on queries, keys and values, always."""

from dynaconv.arch import parts
from dynaconv.arch.spec import Family

FAMILY = Family(
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    sizes=parts.SIZES,
    tensors=(
        *parts.EMBEDDING_AND_HEAD,
        *parts.PRE_NORMS,
        *parts.attention(bias=True),
        *parts.gated_ffn(),
    ),
    ffn=parts.GATED_FFN,
    ignored=parts.ROTARY_BUFFERS,
    defaults={"hidden_act": "silu"},
)
