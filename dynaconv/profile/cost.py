"""What profiling a checkpoint will take, from its headers alone.

D residual width, F FFN width, V vocabulary, L layers.
"""

from __future__ import annotations

from dynaconv.arch.blocks import block_edges
from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.artifacts.files import size_text
from dynaconv.config import RunConfig
from dynaconv.dynamic.curves import PARTS
from dynaconv.pipeline.stage import Estimate
from dynaconv.profile.clusters import SAMPLED
from dynaconv.profile.loss_aware import TOKENS as BACKWARD_TOKENS
from dynaconv.profile.statistics import layout_bytes, tensor_layout
from dynaconv.profile.streaming import HEAD_BYTES, PIECE, READ_BYTES

WORD = 4  # bytes of the float32 that the CPU computes in
RETAINED = 32 * 1024**2  # bytes; the C library's allocator keeps freed memory of tensors below this for later ones


def profile_estimate(config: RunConfig, checkpoint: Checkpoint) -> Estimate:
    """Peak memory on the CPU, disk and FLOPs of profiling ``checkpoint``.

    Raises:
        ConfigError: ``blocks`` does not fit its FFNs.
    """
    sizes, layers, tokens = checkpoint.sizes, checkpoint.layers, config.profile.tokens
    edges = block_edges(sizes["ffn"], config.blocks, config.experts)
    curve_tokens = round(config.profile.curve_share * tokens)
    states = WORD * sizes["residual"] * tokens
    batch = _batch_bytes(checkpoint, config.profile.batch_size * config.data.sequence_length)
    phases = {
        "embedding": embedding_bytes(checkpoint, tokens) + states,
        "layer": states + batch + _layer_bytes(checkpoint, curve_tokens) + _cluster_bytes(config, checkpoint),
        "head": head_bytes(checkpoint) + states + _kept_bytes(config, checkpoint),
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


def importance_estimate(config: RunConfig, checkpoint: Checkpoint, disk_bytes: int) -> Estimate:
    """Peak memory on the CPU and FLOPs of measuring importance, which leaves ``disk_bytes``."""
    sizes, wanted = checkpoint.sizes, config.importance
    states = WORD * sizes["residual"] * wanted.tokens
    batch = _batch_bytes(checkpoint, wanted.batch_size * config.data.sequence_length)
    squares = sizes["ffn"] ** 2 + (sizes["q_head"] * sizes["v_dim"]) ** 2 if wanted.second_moments else 0
    layer = WORD * (checkpoint.ffn_parameters + checkpoint.attention_parameters + squares)
    phases = {
        "embedding": embedding_bytes(checkpoint, wanted.tokens) + states,
        "layer": states + batch + layer,
        "head": head_bytes(checkpoint) + states + batch,
    }
    forward = checkpoint.layers * (checkpoint.ffn_parameters + checkpoint.attention_parameters + squares)
    worst = max(phases, key=lambda phase: phases[phase])
    note = f"most memory is needed for the {worst}; hidden states of {wanted.tokens} tokens take {size_text(states)}"
    flops = 2.0 * wanted.tokens * (forward + checkpoint.head_parameters)
    return Estimate(phases[worst], disk_bytes, flops, (note,))


def embedding_bytes(checkpoint: Checkpoint, tokens: int) -> int:
    """The embedding while ``tokens`` pass it: the rows of those that can occur, and what is read and made at once."""
    rows = min(checkpoint.sizes["vocab"], tokens)
    return WORD * rows * checkpoint.sizes["residual"] + 10 * READ_BYTES


def head_bytes(checkpoint: Checkpoint) -> int:
    """The head while tokens pass it: a piece of it as read and as computed in, logits and states of some tokens."""
    rows = min(checkpoint.sizes["vocab"], PIECE)
    return (WORD + checkpoint.dtype.itemsize) * rows * checkpoint.sizes["residual"] + 4 * HEAD_BYTES


def _batch_bytes(checkpoint: Checkpoint, tokens: int) -> int:
    """Activations of a layer on a batch of ``tokens`` at their most: about 4 F and 10 D a token."""
    return WORD * tokens * (4 * checkpoint.sizes["ffn"] + 10 * checkpoint.sizes["residual"])


def _kept_bytes(config: RunConfig, checkpoint: Checkpoint) -> int:
    """What is left of the layers' activations when they are done: the allocator gives only large tensors back."""
    tokens = config.profile.batch_size * config.data.sequence_length
    largest = WORD * tokens * checkpoint.sizes["ffn"]
    return _batch_bytes(checkpoint, tokens) if largest < RETAINED else 0


def _layer_bytes(checkpoint: Checkpoint, curve_tokens: int) -> int:
    """One decoder layer, its FFN again in order, kept inputs, and the sums with a copy on its way to the disk."""
    residual = checkpoint.sizes["residual"]
    weights = 2 * checkpoint.ffn_parameters + checkpoint.attention_parameters
    return WORD * (weights + curve_tokens * residual + 2 * (residual + 1) ** 2)


def _cluster_bytes(config: RunConfig, checkpoint: Checkpoint) -> int:
    """Where experts are routed: the sample twice and similarities twice, or what blocks add."""
    if config.experts != "routed":
        return 0
    neurons = checkpoint.sizes["ffn"]
    return WORD * (neurons * (2 * SAMPLED + 2 * config.blocks) + 4 * PARTS)


def _backward_bytes(config: RunConfig, checkpoint: Checkpoint) -> int:
    """Activations that a backward pass over one micro-batch keeps: about 4 F and 12 D a token and layer, and 3 V."""
    sizes, window = checkpoint.sizes, config.data.sequence_length
    tokens = min(max(window, BACKWARD_TOKENS), config.profile.batch_size * window)
    per_token = checkpoint.layers * (4 * sizes["ffn"] + 12 * sizes["residual"]) + 3 * sizes["vocab"]
    return WORD * tokens * per_token
