"""GPT-NeoX and Pythia: queries, keys and values as one projection interleaved by head, both branches side by side."""

from dynaconv.arch import parts
from dynaconv.arch.spec import Family, FFNSpec, Size

LAYER = "gpt_neox.layers.{layer}"
ATTENTION = f"{LAYER}.attention"
FFN = f"{LAYER}.mlp"

FAMILY = Family(
    model_type="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    sizes={
        "vocab": Size("vocab_size"),
        "ffn": Size("intermediate_size"),
        **parts.derived_head_dim("hidden_size", "num_attention_heads"),
    },
    tensors=(
        *parts.embedding("gpt_neox.embed_in"),
        *parts.norm("gpt_neox.final_layer_norm", bias=True),
        *parts.head("embed_out"),
        *parts.norm(f"{LAYER}.input_layernorm", bias=True),
        *parts.norm(f"{LAYER}.post_attention_layernorm", bias=True),
        *parts.linear(
            f"{ATTENTION}.query_key_value",
            "q_head*(q_dim+k_dim+v_dim)",
            "residual",
            "attention",
            bias="attention_bias",
        ),
        *parts.linear(
            f"{ATTENTION}.dense", "residual", parts.ATTENDED, "attention", bias="attention_bias", closes=True
        ),
        *parts.linear(f"{FFN}.dense_h_to_4h", "ffn", "residual", "ffn", bias=True),
        *parts.linear(f"{FFN}.dense_4h_to_h", "residual", "ffn", "ffn", bias=True, closes=True),
    ),
    ffn=FFNSpec(FFN, gate=None, up="dense_h_to_4h", down="dense_4h_to_h", activation="hidden_act"),
    ties={"embed_out.weight": "gpt_neox.embed_in.weight"},
    ignored=(
        "gpt_neox.layers.*.attention.bias",
        "gpt_neox.layers.*.attention.masked_bias",
        "gpt_neox.layers.*.attention.rotary_emb.inv_freq",
    ),
    defaults={"attention_bias": True, "hidden_act": "gelu"},
)
