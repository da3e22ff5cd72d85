"""Mistral 7B and its successors with dense FFNs (Nemo sets head_dim apart from the hidden size)."""

from dynaconv.arch import parts
from dynaconv.arch.spec import Family

FAMILY = Family(
    model_type="mistral",
    architectures=("MistralForCausalLM",),
    sizes=parts.SIZES,
    tensors=(
        *parts.EMBEDDING_AND_HEAD,
        *parts.PRE_NORMS,
        *parts.ATTENTION_WEIGHTS,
        *parts.FFN_WEIGHTS,
    ),
    ffn=parts.GATED_FFN,
    ignored=parts.ROTARY_BUFFERS,
)
