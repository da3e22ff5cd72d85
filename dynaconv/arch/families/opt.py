"""OPT, but for the 350M with its norms behind the branches: learned positions from the third row on, biases."""

from dynaconv.arch import parts
from dynaconv.arch.spec import Family, FFNSpec, Size

LAYER = "model.decoder.layers.{layer}"
ATTENTION = f"{LAYER}.self_attn"

FAMILY = Family(
    model_type="opt",
    architectures=("OPTForCausalLM",),
    sizes={
        "vocab": Size("vocab_size"),
        "position": Size("max_position_embeddings", plus=2),
        "ffn": Size("ffn_dim"),
        **parts.derived_head_dim("hidden_size", "num_attention_heads"),
    },
    tensors=(
        *parts.embedding("model.decoder.embed_tokens"),
        *parts.embedding("model.decoder.embed_positions", "position", "position"),
        *parts.norm("model.decoder.final_layer_norm", bias=True),
        *parts.head(),
        *parts.norm(f"{LAYER}.self_attn_layer_norm", bias=True),
        *parts.norm(f"{LAYER}.final_layer_norm", bias=True),
        *parts.linear(f"{ATTENTION}.q_proj", "q_head*q_dim", "residual", "attention", bias="enable_bias"),
        *parts.linear(f"{ATTENTION}.k_proj", "q_head*k_dim", "residual", "attention", bias="enable_bias"),
        *parts.linear(f"{ATTENTION}.v_proj", "q_head*v_dim", "residual", "attention", bias="enable_bias"),
        *parts.linear(
            f"{ATTENTION}.out_proj", "residual", parts.ATTENDED, "attention", bias="enable_bias", closes=True
        ),
        *parts.linear(f"{LAYER}.fc1", "ffn", "residual", "ffn", bias="enable_bias"),
        *parts.linear(f"{LAYER}.fc2", "residual", "ffn", "ffn", bias="enable_bias", closes=True),
    ),
    ffn=FFNSpec(LAYER, gate=None, up="fc1", down="fc2", activation="activation_function"),
    ties={"lm_head.weight": "model.decoder.embed_tokens.weight"},
    prefix="model.",
    defaults={"tie_word_embeddings": True, "enable_bias": True, "activation_function": "relu"},
    requires={
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
    },
    follows={"word_embed_proj_dim": "residual"},
)
