"""Qwen 3: queries and keys are normalised over each head, and head_dim is 128 unless the config says otherwise."""

from dynaconv.arch import parts
from dynaconv.arch.spec import Family, Size

HEAD_DIM = Size("head_dim", otherwise=128)

FAMILY = Family(
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    sizes={**parts.SIZES, "q_dim": HEAD_DIM, "k_dim": HEAD_DIM, "v_dim": HEAD_DIM},
    tensors=(
        *parts.EMBEDDING_AND_HEAD,
        *parts.PRE_NORMS,
        *parts.attention(bias="attention_bias", output_bias="attention_bias"),
        *parts.norm(f"{parts.ATTENTION}.q_norm", "q_dim"),
        *parts.norm(f"{parts.ATTENTION}.k_norm", "k_dim"),
        *parts.gated_ffn(),
    ),
    ffn=parts.GATED_FFN,
    ignored=parts.ROTARY_BUFFERS,
    defaults={"hidden_act": "silu"},
)
