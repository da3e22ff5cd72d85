"""Phi 3 and 4: queries, keys and values stored as one projection, gate and up as another."""

from dynaconv.arch import parts
from dynaconv.arch.spec import Family, FFNSpec

FAMILY = Family(
    model_type="phi3",
    architectures=("Phi3ForCausalLM",),
    sizes=parts.SIZES,
    tensors=(
        *parts.EMBEDDING_AND_HEAD,
        *parts.PRE_NORMS,
        *parts.linear(
            f"{parts.ATTENTION}.qkv_proj",
            f"{parts.QUERIES}+{parts.KEYS}+{parts.VALUES}",
            "residual",
            "attention",
        ),
        *parts.linear(f"{parts.ATTENTION}.o_proj", "residual", parts.ATTENDED, "attention", closes=True),
        *parts.linear(f"{parts.FFN}.gate_up_proj", "ffn+ffn", "residual", "ffn"),
        *parts.linear(f"{parts.FFN}.down_proj", "residual", "ffn", "ffn", closes=True),
    ),
    ffn=FFNSpec(parts.FFN, gate="gate_up_proj", up="gate_up_proj", down="down_proj", activation="hidden_act"),
    ignored=parts.ROTARY_BUFFERS,
    defaults={"hidden_act": "silu"},
)
