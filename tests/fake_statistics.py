"""Statistics as profile writes them, of text that no model has read: orders and sums are valid, not meaningful."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dynaconv.arch.blocks import block_edges
from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.artifacts.files import write_json
from dynaconv.artifacts.tensors import write_tensors


def fake_statistics(
    folder: Path, source: Path, *, blocks: int = 4, experts: str = "nested", seed: int = 0, tokens: int = 200
) -> Path:
    """Writes ``statistics.json`` and ``statistics.safetensors`` for the checkpoint at ``source``; random importance."""
    checkpoint = Checkpoint.open(source)
    neurons, width = checkpoint.sizes["ffn"], checkpoint.sizes["residual"]
    edges = block_edges(neurons, blocks, experts)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in range(checkpoint.layers):
        importance = torch.rand(neurons, generator=generator)
        features = torch.cat([torch.randn(tokens, width, generator=generator), torch.ones(tokens, 1)], dim=1)
        targets = features @ torch.randn(width + 1, blocks, generator=generator)
        found = {
            "activation": importance,
            "importance": importance,
            "order": importance.argsort(descending=True, stable=True),
            "curve_mean": torch.linspace(1, 0, blocks + 1),
            "curve_quantiles": torch.linspace(1, 0, blocks + 1).repeat(3, 1),
            "feature_gram": features.T @ features,
            "feature_target": features.T @ targets,
        }
        tensors.update({f"layers.{layer}.{name}": tensor for name, tensor in found.items()})
    folder.mkdir(parents=True)
    write_tensors(folder / "statistics.safetensors", tensors)
    summary = {
        "schema": 1,
        "tokens": tokens,
        "curve_tokens": tokens,
        "layers": checkpoint.layers,
        "blocks": blocks,
        "edges": list(edges),
        "experts": experts,
        "order": "importance",
        "loss": 5.5,
        "loss_aware": False,
        "seed": seed,
    }
    write_json(folder / "statistics.json", summary)
    return folder
