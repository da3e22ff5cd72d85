"""Mistral 7B and its successors with dense FFNs (Nemo sets head_dim apart from the hidden size)."""

from dynaconv.arch import parts
from dynaconv.arch.spec import Family, Size

FAMILY = Family(
    model_type="mistral",
    architectures=("MistralForCausalLM",),
    sizes={**parts.SIZES, "kv_head": Size("num_key_value_heads", otherwise=8)},
    tensors=(
        *parts.EMBEDDING_AND_HEAD,
        *parts.PRE_NORMS,
        *parts.attention(),
        *parts.gated_ffn(),
    ),
    ffn=parts.GATED_FFN,
    ignored=parts.ROTARY_BUFFERS,
    defaults={"hidden_act": "silu"},
)
