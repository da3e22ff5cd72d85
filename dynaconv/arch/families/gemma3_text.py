"""Gemma 3's language model: Gemma 2 with normalised queries and keys, and another rotary base in sliding layers."""

from dynaconv.arch import parts
from dynaconv.arch.families import gemma2
from dynaconv.arch.spec import Family

FAMILY = Family(
    model_type="gemma3_text",
    architectures=("Gemma3ForCausalLM",),
    sizes=gemma2.FAMILY.sizes,
    tensors=(
        *gemma2.FAMILY.tensors,
        *parts.norm(f"{parts.ATTENTION}.q_norm", "q_dim", offset=1),
        *parts.norm(f"{parts.ATTENTION}.k_norm", "k_dim", offset=1),
    ),
    ffn=gemma2.FAMILY.ffn,
    ignored=parts.ROTARY_BUFFERS,
    defaults=gemma2.FAMILY.defaults,
    attention_scale="query_pre_attn_scalar",
    embedding_scaled=True,
)
