"""Speed of fine-tuning against plain dense training.

    python scripts/bench_finetune.py MODEL

MODEL is a dense checkpoint; text is random tokens. Steps of all variants take turns in one process, so that a busy
machine slows all alike, and ratios are between their fastest steps: tokens/s times the passes that the losses need
(dense training: one forward, one backward), over tokens/s of stock transformers with AdamW. 1 would be no overhead at
all. On a CPU the clock is that of the process. Peak memory is bench_finetune_memory.py's matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dynaconv.arch.blocks import ffn_partition
from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.artifacts.files import write_json
from dynaconv.cli.quiet import silence_libraries
from dynaconv.config import FinetuneConfig, LossConfig, LossesConfig, RunConfig
from dynaconv.data.windows import Windows, training_batch
from dynaconv.dynamic.layout import FFNLayout, Layout, RouterLayout
from dynaconv.ranks import Ranks
from dynaconv.train.engine import TorchEngine
from dynaconv.train.estimate import pass_count
from dynaconv.train.objectives.registry import needs_parent
from dynaconv.train.step import Trainer

DENSE = LossesConfig(full=LossConfig(1.0), distill=LossConfig(0.0), distill_full=LossConfig(0.0))
ALONE = LossesConfig(full=LossConfig(0.5), distill=LossConfig(0.5), distill_full=LossConfig(0.0))
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"router": "uniform", "losses": DENSE},
    "uniform": {"router": "uniform", "uniform_share": 1.0},
    "width": {},
    "curve": {"router": "curve"},
    "class": {"router": "class"},
    "width, parent teaches": {"teacher": "parent"},
    "routed, parent teaches": {"teacher": "parent", "losses": LossesConfig()},
    "width, consistency": {"losses": replace(ALONE, consistency=LossConfig(0.5))},
    "width, routers only": {"trainable": "routers"},
    "width, lora": {"trainable": "lora"},
    "width, checkpointing": {"gradient_checkpointing": True},
}


def main(
    model: Annotated[Path, typer.Argument(help="Dense checkpoint.")],
    batch_size: Annotated[int, typer.Option(help="Windows in a step.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 256,
    rounds: Annotated[int, typer.Option(help="Measured steps of each variant.")] = 5,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("benchmarks/finetune.json"),
) -> None:
    """Measures, prints, writes."""
    silence_libraries()
    torch.set_num_threads(threads)
    configs = {name: recipe(name, batch_size, length) for name in VARIANTS}
    steps: dict[str, Callable[[int], object]] = {"stock": stock_step(model, configs["dense"])}
    trainers = {name: trainer(model, config) for name, config in configs.items()}
    steps |= {name: made.step for name, made in trainers.items()}
    seconds = timed(steps, rounds)
    windows = trainers["width"].windows
    loading = min(_seconds(lambda step: training_batch(windows, step, batch_size, 0), step) for step in range(5))
    rows = []
    for name, config in configs.items():
        counted, own = pass_count(config.finetune), min(seconds[name])
        row = {
            "variant": name,
            "tokens_per_s": round(batch_size * length / own, 1),
            "passes": asdict(counted),
            "over_dense": round(min(seconds["stock"]) * counted.dense / own, 3),
            "loading_share": round(loading / own, 5),
        }
        rows.append(row)
        typer.echo(f"{name:22} {row['tokens_per_s']:9} tokens/s  {row['over_dense']:.2f} of dense per pass  {counted}")
    command = f"python scripts/bench_finetune.py {model.name} --batch-size {batch_size} --length {length}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads} thread(s)"
    stock = round(batch_size * length / min(seconds["stock"]), 1)
    head = {"command": command, "torch": torch.__version__, "device": device, "rounds": rounds}
    write_json(out, head | {"stock_tokens_per_s": stock, "rows": rows})


def recipe(name: str, batch_size: int, length: int) -> RunConfig:
    """Fine-tuning without a parent, with what the variant changes; routers decide from the start."""
    shared: dict[str, Any] = {"batch_size": batch_size, "tokens": 1000 * batch_size * length, "uniform_share": 0.0}
    shared |= {"budgets": [0.2, 0.75], "teacher": "self", "losses": ALONE}
    experts = "routed" if name.startswith("routed") else "nested"
    tuning = replace(FinetuneConfig(), **(shared | VARIANTS[name]))
    config = RunConfig(experts=experts, finetune=tuning)
    config.data.sequence_length = length
    return config


def trainer(folder: Path, config: RunConfig) -> Trainer:
    """A run's trainer on random tokens, the checkpoint cut into blocks in the order it has."""
    from transformers import AutoModelForCausalLM

    from dynaconv.arch.stock import load_dense
    from dynaconv.dynamic.modeling import attach
    from dynaconv.train.router_kinds import router_layout
    from dynaconv.train.trainable import add_adapters, choose

    checkpoint, ranks, tuning = Checkpoint.open(folder), Ranks.single(), config.finetune
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if tuning.trainable == "lora":
        add_adapters(stock, tuning)
    ffn = FFNLayout(**asdict(checkpoint.family.ffn))
    solved = RouterLayout("linear" if config.experts == "routed" else "curve", linear=True)  # as carve would
    router = router_layout(tuning, checkpoint.sizes["residual"], solved)
    layout = Layout(ffn_partition(checkpoint.sizes["ffn"], config), checkpoint.layers, ffn, router)
    network = attach(stock, layout).train()
    choose(network, tuning.trainable)
    if tuning.gradient_checkpointing:
        network.gradient_checkpointing_enable()
    parent = load_dense(folder, ranks.device) if needs_parent(tuning) else None
    return Trainer(TorchEngine(network, tuning, ranks), tuning, tokens(checkpoint, config), 1000, 0, parent)


def tokens(checkpoint: Checkpoint, config: RunConfig) -> Windows:
    """A hundred steps of random tokens."""
    count = 100 * config.finetune.batch_size * config.data.sequence_length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(checkpoint.sizes["vocab"], (count,), generator=generator, dtype=torch.int32)
    return Windows(ids, config.data.sequence_length)


def stock_step(folder: Path, config: RunConfig) -> Callable[[int], object]:
    """Dense training with stock transformers and torch."""
    from transformers import AutoModelForCausalLM

    device, tuning = Ranks.single().device, config.finetune
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    windows = tokens(Checkpoint.open(folder), config)

    def step(number: int) -> None:
        ids = training_batch(windows, number, tuning.batch_size, 0).input_ids.to(device)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), tuning.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timed(steps: dict[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of ``rounds`` steps of each, taking turns, after two that warm up."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            found[name].append(_seconds(step, number))
    return {name: values[2:] for name, values in found.items()}


def _seconds(step: Callable[[int], object], number: int) -> float:
    gpu = torch.cuda.is_available()
    clock = time.perf_counter if gpu else time.process_time
    begun = clock()
    step(number)
    if gpu:
        torch.cuda.synchronize()
    return clock() - begun


if __name__ == "__main__":
    typer.run(main)
