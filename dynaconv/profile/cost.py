"""What profiling a checkpoint will take, from its headers alone.

D residual width, F FFN width, N blocks, V vocabulary, L layers. A ``word`` is what an element takes that is computed.
"""

from __future__ import annotations

import torch

from dynaconv.arch.blocks import ffn_partition, partition_text
from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.artifacts.files import size_text
from dynaconv.config import RunConfig
from dynaconv.kernels.partition import Partition
from dynaconv.pipeline.stage import Estimate
from dynaconv.profile.clusters import ITERATIONS, SAMPLED
from dynaconv.profile.curves import PARTS, curve_widths
from dynaconv.profile.loss_aware import TOKENS as BACKWARD_TOKENS
from dynaconv.profile.measure import AT_ONCE, ROWS
from dynaconv.profile.statistics import layout_bytes, tensor_layout
from dynaconv.profile.streaming import HEAD_BYTES, PIECE, READ_BYTES, quick_dtype

WORD = 4  # bytes of the float32 that sums are kept in, and that importance is measured in
RETAINED = 32 * 1024**2  # bytes; the C library's allocator keeps freed memory of tensors below this for later ones


def profile_estimate(config: RunConfig, checkpoint: Checkpoint) -> Estimate:
    """Peak memory on the CPU, disk and FLOPs of profiling ``checkpoint``.

    Raises:
        ConfigError: ``blocks`` or ``block_size`` does not fit its FFNs.
    """
    sizes, layers, tokens = checkpoint.sizes, checkpoint.layers, config.profile.tokens
    partition = ffn_partition(sizes["ffn"], config)
    widths = curve_widths(partition, config.experts)
    curve_tokens = 0 if config.experts == "neurons" else round(config.profile.curve_share * tokens)
    word = quick_dtype(checkpoint, torch.device("cpu")).itemsize
    states = word * sizes["residual"] * tokens
    batch = _batch_bytes(checkpoint, _tokens_at_once(config), word)
    at_once = _routed_bytes(checkpoint, partition, batch) if config.experts == "routed" else batch
    phases = {
        "embedding": _embedding_bytes(checkpoint, tokens, word) + states,
        "layer": states + at_once + _layer_bytes(checkpoint, partition, curve_tokens, word),
        "head": _head_bytes(checkpoint, word) + states + _kept_bytes(config, checkpoint, word),
    }
    ffn, attention = checkpoint.ffn_parameters, checkpoint.attention_parameters
    forward = 2.0 * (layers * (ffn + attention) + checkpoint.head_parameters)
    again = 2.0 * layers * (ffn + (sizes["residual"] + 1) ** 2)  # the FFN of pass B, and the second moments
    flops = tokens * forward + curve_tokens * again
    if config.profile.loss_aware:
        phases["backward pass"] = word * checkpoint.parameters + _backward_bytes(config, checkpoint, word)
        flops += 2 * curve_tokens * forward  # forward, and the half of a backward pass that reaches activations
    if config.experts == "routed":
        flops += layers * _routed_flops(checkpoint, partition, curve_tokens)
    worst = max(phases, key=lambda phase: phases[phase])
    disk = layout_bytes(tensor_layout(layers, sizes["residual"], partition, widths, config.experts))
    states_note = f"hidden states of {tokens} tokens take {size_text(states)}"
    memory_note = f"most memory is needed for the {worst}; {states_note}"
    return Estimate(phases[worst], disk, flops, (partition_text(layers, partition), memory_note))


def importance_estimate(config: RunConfig, checkpoint: Checkpoint, disk_bytes: int) -> Estimate:
    """Peak memory on the CPU and FLOPs of measuring importance, which leaves ``disk_bytes``."""
    sizes, wanted = checkpoint.sizes, config.importance
    states = WORD * sizes["residual"] * wanted.tokens
    batch = _batch_bytes(checkpoint, wanted.batch_size * config.data.sequence_length, WORD)
    squares = sizes["ffn"] ** 2 + (sizes["q_head"] * sizes["v_dim"]) ** 2 if wanted.second_moments else 0
    layer = WORD * (checkpoint.ffn_parameters + checkpoint.attention_parameters + squares)
    phases = {
        "embedding": _embedding_bytes(checkpoint, wanted.tokens, WORD) + states,
        "layer": states + batch + layer,
        "head": _head_bytes(checkpoint, WORD) + states + batch,
    }
    forward = checkpoint.layers * (checkpoint.ffn_parameters + checkpoint.attention_parameters + squares)
    worst = max(phases, key=lambda phase: phases[phase])
    note = f"most memory is needed for the {worst}; hidden states of {wanted.tokens} tokens take {size_text(states)}"
    flops = 2.0 * wanted.tokens * (forward + checkpoint.head_parameters)
    return Estimate(phases[worst], disk_bytes, flops, (note,))


def _embedding_bytes(checkpoint: Checkpoint, tokens: int, word: int) -> int:
    """The embedding while ``tokens`` pass it: the rows of those that can occur, and what is read and made at once."""
    rows = min(checkpoint.sizes["vocab"], tokens)
    return word * rows * checkpoint.sizes["residual"] + 10 * READ_BYTES


def _head_bytes(checkpoint: Checkpoint, word: int) -> int:
    """The head while tokens pass it: a piece of it as read and as computed in, logits and states of some tokens."""
    rows = min(checkpoint.sizes["vocab"], PIECE)
    return (word + checkpoint.dtype.itemsize) * rows * checkpoint.sizes["residual"] + 4 * HEAD_BYTES


def _tokens_at_once(config: RunConfig) -> int:
    window = config.data.sequence_length
    return min(config.profile.batch_size, max(1, AT_ONCE // window)) * window


def _batch_bytes(checkpoint: Checkpoint, tokens: int, word: int) -> int:
    """Activations of a layer on a batch of ``tokens`` at their most: about 4 F and 10 D a token."""
    return word * tokens * (4 * checkpoint.sizes["ffn"] + 10 * checkpoint.sizes["residual"])


def _kept_bytes(config: RunConfig, checkpoint: Checkpoint, word: int) -> int:
    """What is left of the layers' activations when they are done: the allocator gives only large tensors back."""
    tokens = _tokens_at_once(config)
    largest = word * tokens * checkpoint.sizes["ffn"]
    return _batch_bytes(checkpoint, tokens, word) if largest < RETAINED else 0


def _layer_bytes(checkpoint: Checkpoint, partition: Partition, curve_tokens: int, word: int) -> int:
    """One decoder layer, its FFN again in order, kept inputs, and the sums with a copy on its way to the disk."""
    residual = checkpoint.sizes["residual"]
    if not curve_tokens:  # single neurons: no second pass
        return word * (checkpoint.ffn_parameters + checkpoint.attention_parameters)
    weights = 2 * checkpoint.ffn_parameters + checkpoint.attention_parameters
    sums = (residual + 1) * (residual + 1 + partition.blocks)
    return word * (weights + curve_tokens * residual) + 2 * WORD * sums


def _routed_bytes(checkpoint: Checkpoint, partition: Partition, batch: int) -> int:
    """Of routed experts: a sample of activations while a ``batch`` passes, clusters form, or blocks are measured."""
    neurons, blocks, residual = partition.neurons, partition.blocks, checkpoint.sizes["residual"]
    sample = SAMPLED * neurons
    # Similarities: themselves, those still open, and those of neurons that ask; and three copies of the centres.
    clustering = sample if blocks in (1, neurons) else 2 * sample + 3 * (neurons + SAMPLED) * blocks
    factors = neurons * min(max(partition.sizes), residual) + 3 * min(PARTS, neurons * residual)
    measuring = sample + factors + ROWS * (4 * neurons + 6 * blocks)
    return max(batch + WORD * sample, WORD * clustering, WORD * measuring)


def _routed_flops(checkpoint: Checkpoint, partition: Partition, curve_tokens: int) -> float:
    """Of one layer: clustering, what blocks add, and the errors of some widths."""
    neurons, blocks, residual = partition.neurons, partition.blocks, checkpoint.sizes["residual"]
    clustering = 0 if blocks in (1, neurons) else ITERATIONS * SAMPLED * neurons * blocks
    rank = min(max(partition.sizes), residual)
    measured = len(curve_widths(partition, "routed")) - 1
    return 2.0 * (clustering + neurons * residual * rank + curve_tokens * neurons * (rank + measured * residual))


def _backward_bytes(config: RunConfig, checkpoint: Checkpoint, word: int) -> int:
    """Activations that a backward pass over one micro-batch keeps: about 4 F and 12 D a token and layer, and 3 V."""
    sizes, window = checkpoint.sizes, config.data.sequence_length
    tokens = min(max(window, BACKWARD_TOKENS), config.profile.batch_size * window)
    per_token = checkpoint.layers * (4 * sizes["ffn"] + 12 * sizes["residual"]) + 3 * sizes["vocab"]
    return word * tokens * per_token
