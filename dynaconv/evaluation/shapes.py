"""Random models of published shapes, carved in memory: what a dial does for speed, before anything is converted.

Weights are normal with the standard deviation of a fresh checkpoint, norms are ones. Routers and few-bit copies are
those of the default recipe, and thresholds are solved on random tokens, so that each budget reads the bytes that it
names. What such a model writes means nothing, but it takes as long as one that was trained. F neurons, L layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from dynaconv.arch.checkpoint import CONFIG_FILE, Checkpoint
from dynaconv.arch.registry import family_for
from dynaconv.artifacts.tensors import CheckpointReader, TensorInfo
from dynaconv.config import SketchConfig
from dynaconv.data.windows import Batch
from dynaconv.dynamic.layout import CopyLayout, FFNLayout, Layout, RouterLayout
from dynaconv.dynamic.modeling import attach
from dynaconv.dynamic.projections import ffn_weights
from dynaconv.errors import ConfigError, suggest
from dynaconv.kernels.partition import Partition
from dynaconv.profile.gated import prepare_means, solve_neurons
from dynaconv.profile.measure import Contributions, capture_ffn
from dynaconv.profile.skeleton import activation, skeleton
from dynaconv.rules import require_affordable

DEVIATION = 0.02
"""Standard deviation of random weights, as transformers draws them."""
WINDOWS, LENGTH = 4, 64
"""Random tokens that thresholds are solved on. Few are enough: every token adds L * F scores."""

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-8b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
}
"""``config.json`` of each shape, as far as speed depends on it."""


def shape_config(name: str, *, layers: int | None = None, vocab: int | None = None) -> dict[str, Any]:
    """The ``config.json`` of shape ``name``, with fewer ``layers`` or a smaller ``vocab`` where these are given.

    Raises:
        ConfigError: There is no such shape, or it has fewer layers or tokens than asked for.
    """
    if name not in SHAPES:
        raise ConfigError(f"there is no shape {name!r}", expected=suggest(name, SHAPES))
    config, cuts = dict(SHAPES[name]), {"num_hidden_layers": layers, "vocab_size": vocab}
    for field, value in cuts.items():
        if value is not None and not 1 <= value <= config[field]:
            raise ConfigError(f"{field} is {value}; {name} has {config[field]}", expected="as many, or fewer")
        config[field] = config[field] if value is None else value
    return config


def imagined(config: Mapping[str, Any], dtype: torch.dtype) -> Checkpoint:
    """A checkpoint with ``config`` and weights of ``dtype`` that nobody has written; its tensors cannot be read."""
    family, nowhere = family_for(config), Path()
    tensors = {
        name: TensorInfo(name, dtype, slot.shape, nowhere, 0, prod(slot.shape) * dtype.itemsize)
        for name, slot in family.slots(config).items()
    }
    return Checkpoint(nowhere, config, family, CheckpointReader.imagined(nowhere, tensors))


def empty_model(checkpoint: Checkpoint, device: torch.device) -> Any:
    """The stock model of an :func:`imagined` checkpoint, its parameters on the meta device."""
    with TemporaryDirectory() as folder:
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(dict(checkpoint.config)), encoding="utf-8")
        there = Checkpoint(Path(folder), checkpoint.config, checkpoint.family, checkpoint.reader)
        return skeleton(there, checkpoint.dtype, device)


def share_weights(empty: Any, state: Mapping[str, Tensor]) -> Any:
    """``empty``, whose parameters are on the meta device, with the memory of ``state`` as its weights.

    A weight that does not lie row by row, as stock models have them, is copied.
    """
    empty.load_state_dict({name: value.detach().contiguous() for name, value in state.items()}, assign=True)
    return empty.eval().requires_grad_(False)


@torch.no_grad()
def random_parent(checkpoint: Checkpoint, device: torch.device, seed: int = 0) -> Any:
    """The stock model of an :func:`imagined` checkpoint with random weights, on ``device``."""
    model, generator = empty_model(checkpoint, device), torch.Generator(device).manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        drawn[name] = value.normal_(0.0, DEVIATION, generator=generator) if value.dim() > 1 else value.fill_(1.0)
    model.load_state_dict(drawn, assign=True, strict=False)  # of tied weights, one name is drawn
    model.tie_weights()
    return model.eval().requires_grad_(False)


def sketched_layout(checkpoint: Checkpoint) -> Layout:
    """The layout that the default recipe gives ``checkpoint``: single neurons, chosen by a sketch; no dial yet."""
    sketch, mixed = SketchConfig(), SketchConfig().values == "mixed"
    return Layout(
        partition=Partition.equal(checkpoint.sizes["ffn"], 1),
        layers=checkpoint.layers,
        ffn=FFNLayout(**asdict(checkpoint.family.ffn)),
        router=RouterLayout("sketch", bits=sketch.bits, coarse=sketch.coarse_bits, reach=sketch.reach),
        copy=CopyLayout(sketch.low_bits if mixed else sketch.bits, sketch.group, values=mixed),
        itemsize=checkpoint.dtype.itemsize,
    )


def random_dynamic(checkpoint: Checkpoint, parent: Any, budgets: Sequence[float], seed: int = 0) -> Any:
    """A dynamic model with the weights of ``parent``, in the same memory, and a dial with ``budgets``.

    Args:
        checkpoint: What ``parent`` is the stock model of.
        parent: It.
        budgets: Shares of the parent's FFN bytes, ascending, below 1.
        seed: Of the tokens.

    Raises:
        ConfigError: A budget is below what the routers read.
    """
    device, layout = parent.device, sketched_layout(checkpoint)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(checkpoint.sizes["vocab"], (WINDOWS, LENGTH), generator=generator)
    routers = _measured_routers(checkpoint, parent, tokens.to(device))
    model = attach(share_weights(empty_model(checkpoint, device), parent.state_dict()), layout, routers)
    require_affordable("--dials", budgets, model.ffns()[0].cost.bytes.fixed)
    if budgets:
        prepare_means(model, budgets)
        table = solve_neurons(model, [Batch(tokens)], budgets, measure_means=True)
        model.layout = model.layout.with_dial(table, None)
    return model


@torch.no_grad()
def _measured_routers(checkpoint: Checkpoint, parent: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Tensors of every layer's ``sketch`` router, measured on ``tokens`` (B, T), by the names of their file."""
    spec, act = checkpoint.family.ffn, activation(checkpoint.activation)
    owners = [parent.get_submodule(spec.path.format(layer=layer)) for layer in range(checkpoint.layers)]
    routers: dict[str, Tensor] = {}
    with ExitStack() as stack:
        captured = [stack.enter_context(capture_ffn(owner, spec)).inputs for owner in owners]
        parent(input_ids=tokens, use_cache=False, logits_to_keep=1)
    for layer, (owner, inputs) in enumerate(zip(owners, captured, strict=True)):
        weights = ffn_weights(owner, spec.gate, spec.up, spec.down, act)
        found = Contributions(weights, torch.linalg.vector_norm(weights.down, dim=0, dtype=torch.float32))
        found.add(inputs["x"].flatten(0, -2), inputs["hidden"].flatten(0, -2))
        routers |= {f"layers.{layer}.router.offset": found.level(), f"layers.{layer}.router.up_mean": found.up_means()}
    return routers
