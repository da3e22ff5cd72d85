"""A Llama checkpoint of any size that takes almost no disk: zeros in holes, and a few random values in each tensor.

    python scripts/make_synthetic_checkpoint.py big --bytes 4e9 --statistics big-statistics

For measuring memory, disk and time of what streams weights, not for running: the model says nothing. With
``--statistics`` also writes what ``profile`` would have measured on it, so that it can be carved.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dynaconv.arch.blocks import nested_partition
from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.arch.registry import family_for
from dynaconv.artifacts.files import size_text, write_json
from dynaconv.artifacts.header import plan_file, tensor_bytes
from dynaconv.artifacts.writer import write_at
from dynaconv.profile.statistics import Summary, open_writer, tensor_layout

CURVE_TOKENS = 1000
VALUES = 1024  # random values at the start of each tensor

Entries = list[tuple[str, str, tuple[int, ...]]]


class DType(StrEnum):
    """Names that safetensors headers use."""

    bf16 = "BF16"
    fp32 = "F32"


TORCH_DTYPES = {DType.bf16: torch.bfloat16, DType.fp32: torch.float32}


def llama_config(size: float, item_bytes: int, hidden: int, ffn: int, vocab: int) -> dict[str, Any]:
    """Content of a ``config.json`` whose weights come nearest to ``size`` bytes."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256),
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    one, two = (sum(map(_elements, entries({**config, "num_hidden_layers": n}, DType.bf16))) for n in (1, 2))
    layers = round((size / item_bytes - (2 * one - two)) / (two - one))
    return {**config, "num_hidden_layers": max(1, layers)}


def _elements(entry: tuple[str, str, tuple[int, ...]]) -> int:
    return tensor_bytes("U8", entry[2])


def entries(config: dict[str, Any], dtype: DType) -> Entries:
    """Name, dtype and shape of every tensor of a checkpoint with ``config``."""
    return [(slot.name, dtype.value, slot.shape) for slot in family_for(config).slots(config).values()]


def write_sparse(folder: Path, tensors: Entries, dtype: DType, shard_bytes: float, seed: int) -> None:
    """Writes shards and their index; only headers and the first values of each tensor take up disk."""
    generator = torch.Generator().manual_seed(seed)
    groups: list[Entries] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(tensor_bytes(*t[1:]) for t in (*groups[-1], tensor)) > shard_bytes:
            groups.append([])
        groups[-1].append(tensor)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        path = folder / f"model-{number:05}-of-{len(groups):05}.safetensors"
        head, places = plan_file(group, {"format": "pt"})
        path.write_bytes(head)
        with path.open("r+b") as file:
            file.truncate(places[-1].stop)
        for place in places:
            count = min(VALUES, tensor_bytes("U8", place.shape))
            values = 0.02 * torch.randn(count, generator=generator)
            write_at(path, place.start, values.to(TORCH_DTYPES[dtype]))
            weight_map[place.name] = path.name
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def write_statistics(folder: Path, checkpoint: Checkpoint, blocks: int, seed: int) -> None:
    """Statistics of a text on which features are independent and neurons matter in random order."""
    generator = torch.Generator().manual_seed(seed)
    neurons, width = checkpoint.sizes["ffn"], checkpoint.sizes["residual"]
    partition = nested_partition(neurons, blocks)
    widths = tuple(range(blocks + 1))
    gram = CURVE_TOKENS * torch.eye(width + 1)
    with open_writer(folder, tensor_layout(checkpoint.layers, width, partition, widths, "nested")) as writer:
        for layer in range(checkpoint.layers):
            importance = torch.rand(neurons, generator=generator)
            curve = torch.linspace(1, 0, blocks + 1)
            measured = {
                "activation": importance,
                "importance": importance,
                "order": importance.argsort(descending=True),
                "curve_mean": curve,
                "curve_quantiles": curve.repeat(3, 1),
                "feature_gram": gram,
                "feature_target": torch.randn(width + 1, blocks, generator=generator),
            }
            for name, tensor in measured.items():
                writer.write(f"layers.{layer}.{name}", tensor)
    Summary(
        tokens=CURVE_TOKENS,
        curve_tokens=CURVE_TOKENS,
        layers=checkpoint.layers,
        partition=partition,
        curve_widths=widths,
        loss=10.0,
        experts="nested",
        order="importance",
        loss_aware=False,
        data="synthetic",
        seed=seed,
        dtype="float32",
    ).save(folder)


def main(
    folder: Annotated[Path, typer.Argument(help="Where to write it; made if missing.")],
    size: Annotated[float, typer.Option("--bytes", help="Bytes of weights, about.")] = 4e9,
    dtype: Annotated[DType, typer.Option(help="Type of the weights.")] = DType.bf16,
    hidden: Annotated[int, typer.Option(help="Residual width; a multiple of 256.")] = 2048,
    ffn: Annotated[int, typer.Option(help="Neurons of each FFN.")] = 8192,
    vocab: Annotated[int, typer.Option(help="Vocabulary.")] = 32000,
    shard_bytes: Annotated[float, typer.Option(help="Largest shard.")] = 2e9,
    statistics: Annotated[Path | None, typer.Option(help="Also write matching statistics here.")] = None,
    blocks: Annotated[int, typer.Option(help="Blocks the statistics are for.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the values.")] = 0,
) -> None:
    """Writes the checkpoint."""
    config = llama_config(size, TORCH_DTYPES[dtype].itemsize, hidden, ffn, vocab)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_sparse(folder, entries(config, dtype), dtype, shard_bytes, seed)
    checkpoint = Checkpoint.open(folder)
    if statistics is not None:
        write_statistics(statistics, checkpoint, blocks, seed)
    typer.echo(f"{folder}: {checkpoint.layers} layers, {size_text(checkpoint.reader.total_bytes)} of weights")


if __name__ == "__main__":
    typer.run(main)
