"""GPT-2: learned positions, weights stored as (input, output), queries, keys and values as one projection."""

from dynaconv.arch import parts
from dynaconv.arch.spec import Family, FFNSpec, Size

LAYER = "transformer.h.{layer}"
ATTENTION = f"{LAYER}.attn"
FFN = f"{LAYER}.mlp"

FAMILY = Family(
    model_type="gpt2",
    architectures=("GPT2LMHeadModel",),
    sizes={
        "vocab": Size("vocab_size"),
        "position": Size("n_positions"),
        **parts.derived_head_dim("n_embd", "n_head"),
        "ffn": Size("n_inner", otherwise="4*residual"),
    },
    tensors=(
        *parts.embedding("transformer.wte"),
        *parts.embedding("transformer.wpe", "position", "position"),
        *parts.norm("transformer.ln_f", bias=True),
        *parts.head(),
        *parts.norm(f"{LAYER}.ln_1", bias=True),
        *parts.norm(f"{LAYER}.ln_2", bias=True),
        *parts.conv1d(f"{ATTENTION}.c_attn", "q_head*q_dim+q_head*k_dim+q_head*v_dim", "residual", "attention"),
        *parts.conv1d(f"{ATTENTION}.c_proj", "residual", parts.ATTENDED, "attention", closes=True),
        *parts.conv1d(f"{FFN}.c_fc", "ffn", "residual", "ffn"),
        *parts.conv1d(f"{FFN}.c_proj", "residual", "ffn", "ffn", closes=True),
    ),
    ffn=FFNSpec(FFN, gate=None, up="c_fc", down="c_proj", activation="activation_function"),
    layers="n_layer",
    positions="n_positions",
    ties={"lm_head.weight": "transformer.wte.weight"},
    ignored=("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),
    prefix="transformer.",
    defaults={"tie_word_embeddings": True, "activation_function": "gelu_new"},
    requires={"add_cross_attention": False, "scale_attn_weights": True},
    layer_scale="scale_attn_by_inverse_layer_idx",
)
