"""Statistics as profile writes them, of text that no model has read: orders and sums are valid, not meaningful."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dynaconv.arch.blocks import ffn_partition
from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.artifacts.tensors import write_tensors
from dynaconv.config import RunConfig
from dynaconv.profile.curves import curve_widths
from dynaconv.profile.statistics import TENSOR_FILE, Summary


def fake_statistics(
    folder: Path, source: Path, config: RunConfig | None = None, *, seed: int = 0, tokens: int = 200
) -> Path:
    """Writes ``statistics.json`` and ``statistics.safetensors`` for the checkpoint at ``source``; random importance.

    The blocks are those of ``config``, or four nested ones.
    """
    config = config or RunConfig(experts="nested", blocks=4)
    checkpoint = Checkpoint.open(source)
    neurons, width = checkpoint.sizes["ffn"], checkpoint.sizes["residual"]
    partition = ffn_partition(neurons, config)
    blocks, widths = partition.blocks, curve_widths(partition, config.experts)
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
            "curve_mean": torch.linspace(1, 0, len(widths)),
            "curve_quantiles": torch.linspace(1, 0, len(widths)).repeat(3, 1),
            "feature_gram": features.T @ features,
            "feature_target": features.T @ targets,
        }
        tensors.update({f"layers.{layer}.{name}": tensor for name, tensor in found.items()})
    folder.mkdir(parents=True)
    write_tensors(folder / TENSOR_FILE, tensors)
    Summary(
        tokens=tokens,
        curve_tokens=tokens,
        layers=checkpoint.layers,
        partition=partition,
        curve_widths=widths,
        loss=5.5,
        experts=config.experts,
        order="importance",
        loss_aware=False,
        data="fake",
        seed=seed,
        dtype="float32",
    ).save(folder)
    return folder
