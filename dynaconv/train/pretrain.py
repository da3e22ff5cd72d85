"""Trains a small dense language model from nothing: tokenizer, weights, held-out loss, a folder that stock tools load.

This is where the embedded default comes from (``defaults.py``) and what ``scripts/pretrain_base.py`` runs at larger
shapes. It is no stage: it makes the dense checkpoint that a conversion starts from.

The learning rate warms up, stays, and decays linearly to zero over the last part of the run. On a CPU with a fixed
number of threads, the same settings and text give the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynaconv.artifacts.files import fsync_tree, partial_name, storage_errors, write_json
from dynaconv.config import DataConfig
from dynaconv.data.corpus import Corpus, load_corpus
from dynaconv.data.windows import Batch, evaluation_batches, training_batch
from dynaconv.errors import ArtifactError, ConfigError, QualityError
from dynaconv.progress import Progress
from dynaconv.threads import Work, choose, using
from dynaconv.train.shape import Shape, build, train_tokenizer


@dataclass(frozen=True)
class Schedule:
    """How much is trained, and how; the defaults are the embedded base's.

    Attributes:
        tokens: Training tokens; text that is shorter is gone through more than once.
        batch_size: Windows in an optimiser step.
        accumulation: Micro-batches a step is cut into.
        learning_rate: Peak, of Muon for the layers' matrices and of AdamW for the rest.
        warmup_share: Share of the steps in which the rate climbs.
        decay_share: Share of the steps, at the end, in which it falls to zero.
        weight_decay: Decoupled weight decay on the layers' matrices.
        clip: Largest gradient norm.
        precision: ``fp32``, or ``bf16`` for autocast; what is saved is fp32 either way.
        validation_tokens: Held-out tokens that are scored at the end.
        seed: Seeds initialisation and data order.
        threads: CPU threads; ``None`` takes those that are fastest when the training begins.
    """

    tokens: int = 768_000
    batch_size: int = 2
    accumulation: int = 1
    learning_rate: float = 5e-3
    warmup_share: float = 0.02
    decay_share: float = 0.4
    weight_decay: float = 0.1
    clip: float = 1.0
    precision: str = "fp32"
    validation_tokens: int = 65536
    seed: int = 0
    threads: int | None = None


@dataclass(frozen=True)
class Pretraining:
    """Everything the result depends on."""

    shape: Shape = field(default_factory=Shape)
    schedule: Schedule = field(default_factory=Schedule)
    data: DataConfig = field(default_factory=lambda: DataConfig(sequence_length=256))


def pretrain(out: Path, settings: Pretraining, progress: Progress, *, device: str = "cpu") -> dict[str, Any]:
    """Trains and saves a checkpoint in ``out``, which appears whole or not at all.

    Besides the checkpoint and its tokenizer, ``out`` gets ``pretraining.json`` (settings and measurements) and a
    README.

    Returns:
        What was measured: ``parameters``, ``tokens``, ``steps``, ``seconds`` (in all), ``training_seconds``,
        ``tokens_per_second``, ``train_loss`` and ``validation_loss`` (nats per token).

    Raises:
        ConfigError: Sizes that cannot be.
        DataError: Too little text.
        ArtifactError: ``out`` exists, or cannot be written.
        QualityError: The loss stopped being a number.
    """
    problems = settings.shape.problems()
    if problems:
        raise ConfigError.from_problems(problems, where="shape")
    if out.exists():
        raise ArtifactError("the output folder exists", where=out, hint="choose another one, or remove it")
    started = time.monotonic()
    with using(settings.schedule.threads or _threads(settings, progress)):
        progress.say(f"pretraining a base model on {', '.join(settings.data.train)}")
        tokenizer = train_tokenizer(settings.data, settings.shape)
        corpus = load_corpus(
            settings.data,
            tokenizer,
            train_tokens=settings.schedule.tokens,
            validation_tokens=settings.schedule.validation_tokens,
            max_positions=settings.shape.positions,
            vocabulary=settings.shape.vocabulary,
            accept_less=True,
            say=progress.say,
        )
        model = build(settings.shape, settings.schedule.seed).to(device)
        measured = _train(model, corpus, settings.schedule, progress)
        measured["validation_loss"] = held_out_loss(model, corpus, settings.schedule)
    measured["seconds"] = round(time.monotonic() - started, 2)
    _save(out, model.cpu(), tokenizer, settings, {**measured, "data_digest": corpus.digest})
    progress.say(
        f"base model: {measured['parameters'] / 1e6:.2f}M parameters, {measured['tokens'] / 1e6:.2f}M tokens, "
        f"held-out loss {measured['validation_loss']:.3f} nats per token, {measured['seconds']:.0f} s; in {out}"
    )
    return measured


def rate(step: int, steps: int, schedule: Schedule) -> float:
    """Factor on the peak learning rate at ``step`` (from 0): up, level, and linearly down to almost zero."""
    warmup = max(1, round(steps * schedule.warmup_share))
    decay = max(1, round(steps * schedule.decay_share))
    return min(1.0, (step + 1) / warmup, (steps - step) / decay)


@torch.no_grad()
def held_out_loss(model: Any, corpus: Corpus, schedule: Schedule) -> float:
    """Mean loss on held-out windows, in nats per token that is predicted."""
    model.eval()
    total, count = 0.0, 0
    for batch in evaluation_batches(corpus.validation, schedule.batch_size, schedule.validation_tokens):
        total += float(_summed_loss(model, batch, schedule))
        count += int(batch.predicted.sum())
    return total / max(1, count)


def _train(model: Any, corpus: Corpus, schedule: Schedule, progress: Progress) -> dict[str, Any]:
    tokens_per_step = schedule.batch_size * corpus.train.length
    steps = max(1, schedule.tokens // tokens_per_step)
    optimizers = _optimizers(model, schedule)
    model.train()
    recent: list[float] = []
    started = time.monotonic()
    with progress.task("pretrain", total=steps, unit="steps") as task:
        for step in range(steps):
            batch = training_batch(corpus.train, step, schedule.batch_size, schedule.seed)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = schedule.learning_rate * rate(step, steps, schedule)
            loss = _step(model, optimizers, batch, schedule)
            if not math.isfinite(loss):
                where = f"pretraining, step {step + 1} of {steps}"
                raise QualityError("the loss is no longer a number", where=where, hint="lower the learning rate")
            recent = [*recent[-49:], loss]
            task.advance(1, tokens=tokens_per_step, note=f"loss {sum(recent) / len(recent):.3f}")
    seconds = time.monotonic() - started
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "train_loss": sum(recent) / len(recent),
        "training_seconds": round(seconds, 2),
        "tokens_per_second": round(steps * tokens_per_step / seconds),
    }


def _step(model: Any, optimizers: list[torch.optim.Optimizer], batch: Batch, schedule: Schedule) -> float:
    """One optimiser step; mean loss over the whole batch in nats per token."""
    count = max(1, int(batch.predicted.sum()))
    total = 0.0
    for part in batch.split(schedule.accumulation):
        loss = _summed_loss(model, part, schedule) / count
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


def _summed_loss(model: Any, batch: Batch, schedule: Schedule) -> Tensor:
    """Cross-entropy summed over the predicted tokens of ``batch``, in nats."""
    moved = batch.to(model.device)
    bf16 = schedule.precision == "bf16"
    with torch.autocast(model.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
        logits = model(input_ids=moved.input_ids, attention_mask=moved.attention_mask, use_cache=False).logits
    logits = logits[:, :-1].flatten(0, 1).float()  # (B * (T - 1), V)
    return torch.nn.functional.cross_entropy(logits, moved.labels[:, 1:].flatten(), reduction="sum")


def _optimizers(model: Any, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Muon (orthogonalised momentum) for the layers' matrices, AdamW for embeddings and norms.

    At a few thousand steps Muon is far ahead of AdamW alone. Its updates are scaled to AdamW's usual size, so that one
    learning rate serves both.
    """
    named = list(model.named_parameters())
    in_layers = {name for name, p in named if p.dim() == 2 and any(part.isdigit() for part in name.split("."))}
    matrices = [p for name, p in named if name in in_layers]
    others = [p for name, p in named if name not in in_layers]
    rate, decay = schedule.learning_rate, schedule.weight_decay
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    ]


def _threads(settings: Pretraining, progress: Progress) -> int | None:
    shape, tokens = settings.shape, settings.schedule.batch_size * settings.data.sequence_length
    choice = choose(lambda: Work(tokens // settings.schedule.accumulation, shape.hidden, shape.ffn))
    if choice.reason:
        progress.say(choice.reason)
    return choice.count


def _save(out: Path, model: Any, tokenizer: Any, settings: Pretraining, measured: dict[str, Any]) -> None:
    partial = partial_name(out)
    with storage_errors(out):
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            versions = {"python": platform.python_version(), "torch": torch.__version__}
            record = {"settings": asdict(settings), "measured": measured, "versions": versions}
            write_json(partial / "pretraining.json", record)
            (partial / "README.md").write_text(_readme(settings, measured), encoding="utf-8")
            fsync_tree(partial)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _readme(settings: Pretraining, measured: dict[str, Any]) -> str:
    return f"""# A small base model made by dynaconv

A dense {settings.shape.family} model trained from random weights on {", ".join(settings.data.train)},
to have something to convert. Not good for anything else.

| parameters | training tokens | held-out loss, nats per token | seconds |
| --- | --- | --- | --- |
| {measured["parameters"]:,} | {measured["tokens"]:,} | {measured["validation_loss"]:.4f} | {measured["seconds"]} |

Shape: `{json.dumps(asdict(settings.shape))}`. Everything else is in `pretraining.json`.
"""
