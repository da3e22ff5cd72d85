"""What profiling costs beside a plain forward pass over the same tokens: interleaved medians, one thread, JSON.

    python scripts/bench_profile.py --out benchmarks/profile.json
    python scripts/bench_profile.py --checkpoint FOLDER --text FILE --out benchmarks/profile.json

The plain pass is the stock model, loaded, computing logits and the loss of the same batches; its loading is not
counted. The profile pass streams layer by layer from disk: reading the weights (checked for NaN) is counted, and so
are the loss, the order, the curves and the sums for routers. Without a checkpoint, one with random weights is made.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dynaconv.arch.blocks import nested_partition
from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.artifacts.files import read_json, write_json
from dynaconv.data.windows import Batch
from dynaconv.profile.measure import Sample, measure_layer
from dynaconv.profile.streaming import LayerStream


def random_checkpoint(folder: Path, width: int, neurons: int, layers: int, vocabulary: int) -> Path:
    """Writes a llama of the given shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        vocab_size=vocabulary,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def profile_pass(folder: Path, batches: list[Batch], curve_share: float, blocks: int) -> float:
    """The forward-only part of the profile stage without its output files; the loss."""
    checkpoint = Checkpoint.open(folder)
    stream, sample = LayerStream(checkpoint), Sample.of(batches, curve_share)
    hidden, partition = stream.embed(batches), nested_partition(checkpoint.sizes["ffn"], blocks)
    for index in range(checkpoint.layers):
        measure_layer(stream, index, hidden, sample, order="importance", partition=partition)
    return stream.loss(hidden, batches)


@torch.no_grad()
def plain_pass(model: Any, batches: list[Batch]) -> float:
    """Logits and loss of the stock model."""
    losses = [model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss for batch in batches]
    return float(torch.stack(losses).mean())


def measure(folder: Path, batches: list[Batch], curve_share: float, blocks: int, repeats: int) -> dict[str, Any]:
    """Seconds of both, one after the other, ``repeats`` times, after one uncounted batch each."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    passes: dict[str, Callable[[list[Batch]], float]] = {
        "plain": lambda text: plain_pass(model, text),
        "profile": lambda text: profile_pass(folder, text, curve_share, blocks),
    }
    wall: dict[str, list[float]] = {name: [] for name in passes}
    processor: dict[str, list[float]] = {name: [] for name in passes}
    losses = {name: run(batches[:1]) for name, run in passes.items()}
    for _ in range(repeats):
        for name, run in passes.items():
            start = time.perf_counter(), time.process_time()
            losses[name] = run(batches)
            wall[name].append(time.perf_counter() - start[0])
            processor[name].append(time.process_time() - start[1])
    if abs(losses["plain"] - losses["profile"]) > 1e-4:
        raise SystemExit(f"the two passes disagree on the loss: {losses}")
    plain, profile = (statistics.median(wall[name]) for name in ("plain", "profile"))
    tokens = sum(batch.tokens for batch in batches)
    return {
        "tokens": tokens,
        "loss": losses["profile"],
        "plain_seconds": plain,
        "profile_seconds": profile,
        "ratio": profile / plain,
        "pairwise_ratios": [b / a for a, b in zip(wall["plain"], wall["profile"], strict=True)],
        "processor_ratio": statistics.median(processor["profile"]) / statistics.median(processor["plain"]),
        "profile_tokens_per_s": tokens / profile,
    }


def main(
    out: Annotated[Path, typer.Option(help="JSON file; results of other shapes in it are kept.")],
    checkpoint: Annotated[Path | None, typer.Option(help="A checkpoint instead of a random one.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text for it; random tokens otherwise.")] = None,
    width: int = 512,
    neurons: int = 2048,
    layers: int = 8,
    vocabulary: int = 8192,
    tokens: int = 16384,
    length: int = 256,
    batch_size: int = 16,
    curve_share: float = 0.25,
    blocks: int = 8,
    repeats: int = 5,
) -> None:
    """Measures one shape and adds it to the JSON file."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkpoint or random_checkpoint(Path(temporary) / "model", width, neurons, layers, vocabulary)
        batches = _batches(folder, text, tokens // length, length, batch_size)
        result = measure(folder, batches, curve_share, blocks, repeats)
        sizes = Checkpoint.open(folder)
        shape = {"layers": sizes.layers, **sizes.sizes}
    name = checkpoint.name if checkpoint else f"llama-random-{width}x{neurons}x{layers}"
    settings = {"curve_share": curve_share, "blocks": blocks, "batch": [batch_size, length], "repeats": repeats}
    machine = {"machine": platform.machine(), "threads": 1, "torch": torch.__version__}
    known = read_json(out) if out.exists() else {}
    command = shlex.join(["python", *map(str, sys.argv)])
    known[name] = {"command": command, "shape": shape, **settings, **machine, **result}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, known)
    print(json.dumps(known[name], indent=1))


def _batches(folder: Path, text: Path | None, windows: int, length: int, batch_size: int) -> list[Batch]:
    if text is None:
        vocabulary = Checkpoint.open(folder).sizes["vocab"]
        ids = torch.randint(0, vocabulary, (windows, length), generator=torch.Generator().manual_seed(0))
    else:
        from dynaconv.data.tokenizer import load_tokenizer

        stream = load_tokenizer(folder)(text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
        ids = torch.tensor(stream[: windows * length]).view(-1, length)
    return [Batch(rows) for rows in torch.split(ids, batch_size)]


if __name__ == "__main__":
    typer.run(main)
