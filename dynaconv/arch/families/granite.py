"""Granite 3: Llama's tensors, with constants that scale embeddings, branches, scores and logits."""

from dynaconv.arch import parts
from dynaconv.arch.families import llama
from dynaconv.arch.spec import Family

FAMILY = Family(
    model_type="granite",
    architectures=("GraniteForCausalLM",),
    sizes=parts.SIZES,
    tensors=llama.FAMILY.tensors,
    ffn=parts.GATED_FFN,
    ignored=parts.ROTARY_BUFFERS,
    defaults={"hidden_act": "silu", "attention_multiplier": 1.0},
    attention_scale="attention_multiplier",
)
