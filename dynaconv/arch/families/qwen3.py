"""Qwen 3: queries and keys are normalised over each head, and head_dim is 128 unless the config says otherwise."""

from dynaconv.arch import parts
from dynaconv.arch.spec import Family, Size, TensorSpec

FAMILY = Family(
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    sizes={**parts.SIZES, "head_dim": Size("head_dim", otherwise=128)},
    tensors=(
        *parts.EMBEDDING_AND_HEAD,
        *parts.PRE_NORMS,
        *parts.ATTENTION_WEIGHTS,
        *parts.qkv_biases(when="attention_bias"),
        *parts.output_bias(when="attention_bias"),
        TensorSpec(f"{parts.ATTENTION}.q_norm.weight", ("head_dim",), "norm"),
        TensorSpec(f"{parts.ATTENTION}.k_norm.weight", ("head_dim",), "norm"),
        *parts.FFN_WEIGHTS,
    ),
    ffn=parts.GATED_FFN,
    ignored=parts.ROTARY_BUFFERS,
)
