"""What profiling a checkpoint will take, from its headers alone.

D residual width, F FFN width, V vocabulary, L layers.
"""

from __future__ import annotations

from dynaconv.arch.blocks import block_edges
from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.artifacts.files import size_text
from dynaconv.config import RunConfig
from dynaconv.pipeline.stage import Estimate
from dynaconv.profile.loss_aware import TOKENS as BACKWARD_TOKENS
from dynaconv.profile.statistics import layout_bytes, tensor_layout
from dynaconv.profile.streaming import LOGITS_BYTES

WORD = 4  # bytes of the float32 that the CPU computes in


def profile_estimate(config: RunConfig, checkpoint: Checkpoint) -> Estimate:
    """Peak memory on the CPU, disk and FLOPs of profiling ``checkpoint``.

    Raises:
        ConfigError: ``blocks`` does not fit its FFNs.
    """
    sizes, layers, tokens = checkpoint.sizes, checkpoint.layers, config.profile.tokens
    edges = block_edges(sizes["ffn"], config.blocks)
    curve_tokens = round(config.profile.curve_share * tokens)
    states = WORD * sizes["residual"] * tokens
    phases = {
        "embedding": WORD * checkpoint.embedding_parameters + states,
        "layer": states + _layer_bytes(config, checkpoint, curve_tokens),
        "head": WORD * checkpoint.head_parameters + states + 3 * LOGITS_BYTES,
    }
    ffn, attention = checkpoint.ffn_parameters, checkpoint.attention_parameters
    forward = 2.0 * (layers * (ffn + attention) + checkpoint.head_parameters)
    again = 2.0 * layers * (ffn + (sizes["residual"] + 1) ** 2)  # the FFN of pass B, and the second moments
    flops = tokens * forward + curve_tokens * again
    if config.profile.loss_aware:
        phases["backward pass"] = WORD * checkpoint.parameters + _backward_bytes(config, checkpoint)
        flops += 2 * curve_tokens * forward  # forward, and the half of a backward pass that reaches activations
    worst = max(phases, key=lambda phase: phases[phase])
    disk = layout_bytes(tensor_layout(layers, sizes["residual"], edges))
    states_note = f"hidden states of {tokens} tokens take {size_text(states)}"
    return Estimate(phases[worst], disk, flops, (f"most memory is needed for the {worst}; {states_note}",))


def _layer_bytes(config: RunConfig, checkpoint: Checkpoint, curve_tokens: int) -> int:
    """One decoder layer, its FFN again in order, activations of one batch, kept inputs, and the sums."""
    residual, neurons = checkpoint.sizes["residual"], checkpoint.sizes["ffn"]
    weights = 2 * checkpoint.ffn_parameters + checkpoint.attention_parameters
    batch = config.profile.batch_size * config.data.sequence_length * (4 * neurons + 4 * residual)
    sums = 2 * (residual + 1) ** 2  # the second moments, and a copy on its way to the disk
    return WORD * (weights + batch + curve_tokens * residual + sums)


def _backward_bytes(config: RunConfig, checkpoint: Checkpoint) -> int:
    """Activations that a backward pass over one micro-batch keeps: about 4 F and 12 D a token and layer, and 3 V."""
    sizes, window = checkpoint.sizes, config.data.sequence_length
    tokens = min(max(window, BACKWARD_TOKENS), config.profile.batch_size * window)
    per_token = checkpoint.layers * (4 * sizes["ffn"] + 12 * sizes["residual"]) + 3 * sizes["vocab"]
    return WORD * tokens * per_token
