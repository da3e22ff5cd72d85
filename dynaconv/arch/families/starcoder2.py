"""StarCoder 2: grouped queries with an FFN that has no gate, LayerNorms, biases unless the config says otherwise."""

from dynaconv.arch import parts
from dynaconv.arch.spec import Family, FFNSpec, Size

FAMILY = Family(
    model_type="starcoder2",
    architectures=("Starcoder2ForCausalLM",),
    sizes={**parts.SIZES, "kv_head": Size("num_key_value_heads", otherwise=2)},
    tensors=(
        *parts.embedding("model.embed_tokens"),
        *parts.norm("model.norm", bias=True),
        *parts.head(),
        *parts.norm(f"{parts.LAYER}.input_layernorm", bias=True),
        *parts.norm(f"{parts.LAYER}.post_attention_layernorm", bias=True),
        *parts.attention(bias="use_bias", output_bias="use_bias"),
        *parts.linear(f"{parts.FFN}.c_fc", "ffn", "residual", "ffn", bias="use_bias"),
        *parts.linear(f"{parts.FFN}.c_proj", "residual", "ffn", "ffn", bias="use_bias", closes=True),
    ),
    ffn=FFNSpec(parts.FFN, gate=None, up="c_fc", down="c_proj", activation="hidden_act"),
    ignored=parts.ROTARY_BUFFERS,
    defaults={"tie_word_embeddings": True, "use_bias": True, "hidden_act": "gelu_pytorch_tanh"},
)
