"""How fast text becomes tokens and tokens become batches, beside what training consumes; medians, JSON.

    python scripts/bench_data.py --checkpoint FOLDER --data SPEC --out benchmarks/data.json

Tokenising is measured as fine-tuning does it: from documents to a file on disk, split included, with one process and
with two workers, which start after the first 16 million characters. Assembly is the call that training makes for each
step, on tokens in memory, on the same tokens mapped from disk, on two weighted sources, and on one padded document a
window. Training is one forward and backward pass of the stock checkpoint, without an optimiser: less work than
fine-tuning does.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import itertools
import json
import platform
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dynaconv.artifacts.files import write_json
from dynaconv.config import DataConfig
from dynaconv.data.corpus import load_corpus
from dynaconv.data.tokenizer import load_tokenizer
from dynaconv.data.windows import Batch, Windows, training_batch

STEPS = 500  # batches assembled in one measurement


def medians(works: Mapping[str, Callable[[], int]], repeats: int) -> dict[str, dict[str, float]]:
    """Tokens a second of each of ``works``, which return tokens, by the clock and by processor time, workers' included.

    They run one after the other, ``repeats`` times. On a busy machine only processor time says something.
    """
    wall: dict[str, list[float]] = {name: [] for name in works}
    processor: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start = time.perf_counter(), processor_seconds()
            tokens = work()
            wall[name].append(tokens / (time.perf_counter() - start[0]))
            processor[name].append(tokens / (processor_seconds() - start[1]))
    return {
        name: {
            "tokens_per_s": round(statistics.median(wall[name])),
            "tokens_per_processor_second": round(statistics.median(processor[name])),
        }
        for name in works
    }


def processor_seconds() -> float:
    """Of this process and of those it started that have ended."""
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + workers.ru_utime + workers.ru_stime


def tokenising(data: DataConfig, tokenizer: Any, tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens a second from documents to a file, with one process and with two."""
    vocabulary = len(tokenizer)

    def write(workers: int) -> int:
        with tempfile.TemporaryDirectory() as folder:
            corpus = load_corpus(
                data,
                tokenizer,
                train_tokens=tokens,
                validation_tokens=0,
                vocabulary=vocabulary,
                accept_less=True,
                folder=Path(folder),
                workers=workers,
            )
            return corpus.train.total_tokens

    return medians({f"workers {workers}": partial(write, workers) for workers in (1, 2)}, repeats)


def assembly(data: DataConfig, tokenizer: Any, folder: Path, tokens: int, batch: int, repeats: int) -> dict[str, Any]:
    """Tokens a second of ``training_batch`` on each kind of windows."""
    load = partial(load_corpus, train_tokens=tokens, validation_tokens=0, accept_less=True, vocabulary=len(tokenizer))
    mixed = replace(data, train=[*data.train, *data.train], weights=[0.5] * 2 * len(data.train))
    kinds: dict[str, Windows] = {
        "memory": load(data, tokenizer).train,
        "disk": load(data, tokenizer, folder=folder).train,
        "mixture": load(mixed, tokenizer).train,
        "padded": load(replace(data, pack=False), tokenizer).train,
    }
    steps = itertools.count()

    def assemble(windows: Windows) -> int:
        return sum(training_batch(windows, next(steps), batch, 0).tokens for _ in range(STEPS))

    for windows in kinds.values():
        assemble(windows)  # draws the epoch's order, which is kept
    return medians({kind: partial(assemble, windows) for kind, windows in kinds.items()}, repeats)


def training(folder: Path, batch: Batch, repeats: int) -> dict[str, Any]:
    """Tokens a second of a forward and backward pass of the stock model on ``batch``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()

    def step() -> int:
        model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss.backward()
        return batch.tokens

    step()
    return medians({"training": step}, repeats)["training"]


def main(
    checkpoint: Annotated[Path, typer.Option(help="A dense checkpoint with its tokenizer.")],
    out: Annotated[Path, typer.Option(help="JSON file.")],
    data: Annotated[str, typer.Option(help="A file, glob, folder, dataset or python-stdlib.")] = "python-stdlib",
    tokens: Annotated[int, typer.Option(help="Tokens taken of it.")] = 2_500_000,
    copies: Annotated[int, typer.Option(help="Times the text is tokenised over in one measurement.")] = 4,
    batch: Annotated[int, typer.Option(help="Windows in a batch.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 256,
    repeats: int = 5,
) -> None:
    """Measures all of it and writes the JSON file."""
    torch.set_num_threads(1)
    config, tokenizer = DataConfig(train=[data], sequence_length=length), load_tokenizer(checkpoint)
    much = replace(config, train=[data] * copies)
    result: dict[str, Any] = {"tokenising": tokenising(much, tokenizer, copies * tokens, repeats)}
    with tempfile.TemporaryDirectory() as folder:
        result["assembly"] = assembly(config, tokenizer, Path(folder), tokens, batch, repeats)
        windows = load_corpus(config, tokenizer, train_tokens=batch * length, validation_tokens=0).train
        result["training"] = training(checkpoint, training_batch(windows, 0, batch, 0), repeats)
    pace = "tokens_per_processor_second"
    slowest = min(kind[pace] for kind in result["assembly"].values())
    result["assembly_share_of_a_step"] = round(result["training"][pace] / slowest, 6)
    result |= {
        "checkpoint": checkpoint.name,
        "data": data,
        "tokens": tokens,
        "copies": copies,
        "batch": [batch, length],
    }
    result |= {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    arguments = [checkpoint.name if argument == str(checkpoint) else argument for argument in sys.argv]
    result["command"] = shlex.join(["python", *arguments])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    typer.run(main)
