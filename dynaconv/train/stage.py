"""The ``finetune`` stage: a carved checkpoint in, the same with tuned weights and trained routers out."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaconv.artifacts.files import require_space
from dynaconv.config import FinetuneConfig, RunConfig
from dynaconv.pipeline.stage import Dense, Estimate, Stage, StageContext

if TYPE_CHECKING:
    from dynaconv.data.windows import Windows
    from dynaconv.train.engine import Engine

METRICS_FILE = "metrics.jsonl"


class FinetuneStage(Stage):
    """Trains weights and routers at sampled budgets; resumes in the middle, exactly."""

    name = "finetune"
    consumes = ("parent", "dynamic")
    produces = "dynamic"
    invalidates = ("dials",)
    distributed = True
    sections = ("seed", "data", "finetune")
    unfingerprinted = ("finetune.save_every", "finetune.wandb")

    def estimate(self, config: RunConfig, source: Dense) -> Estimate:
        """Weights, gradients and AdamW's two moments in fp32, and the activations of one micro-batch."""
        from dynaconv.arch.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(source)
        tuning, sizes = config.finetune, checkpoint.sizes
        tokens = tuning.batch_size * config.data.sequence_length // tuning.accumulation
        per_layer = 22 * sizes["residual"] + 8.25 * sizes["ffn"]  # fp32 values kept a token, measured
        kept = sizes["residual"] * checkpoint.layers + per_layer
        if not tuning.gradient_checkpointing:
            kept = checkpoint.layers * per_layer
        activations = round(4 * tokens * (kept + 9.5 * sizes["vocab"]))
        weights = 4 * checkpoint.parameters
        parent = weights if tuning.teacher == "parent" else 0
        return Estimate(
            peak_bytes=4 * weights + parent + activations,
            disk_bytes=checkpoint.reader.total_bytes,
            flops=(12.0 if tuning.teacher == "self" else 14.0) * checkpoint.parameters * tuning.tokens,
            notes=(f"{_steps(tuning, config)} steps of {tuning.batch_size} x {config.data.sequence_length} tokens",),
        )

    def run(self, context: StageContext) -> dict[str, Any]:
        """Trains from the last saved state to the end, then writes the checkpoint."""
        import torch

        from dynaconv.train.engine import build_engine
        from dynaconv.train.loop import Trainer
        from dynaconv.train.state import Position, load_state, save_state
        from dynaconv.train.tracking import Tracker

        config, tuning = context.config, context.config.finetune
        torch.manual_seed(config.seed)
        ranks = context.ranks
        model = routed_model(context.inputs["dynamic"], tuning)
        if tuning.gradient_checkpointing:
            # transformers 5.23 has a new name for it and warns at the old one
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        if not ranks.main:
            torch.manual_seed(config.seed + (ranks.rank << 32))  # another dropout on each rank
        require_space(context.work, 2 * 12 * sum(p.numel() for p in model.parameters()))
        engine = build_engine(model, config, ranks)
        parent = frozen_parent(context.inputs["parent"], ranks.device) if tuning.teacher == "parent" else None
        windows = training_windows(context, model.config.vocab_size, model.config.max_position_embeddings)
        trainer = Trainer(engine, tuning, windows, _steps(tuning, config), config.seed, parent)
        start = load_state(context.work, engine)
        trainer.drift = start.drift
        if start.step:
            context.log.info("resuming after step %d of %d", start.step, trainer.steps)
        tracker = ranks.main and Tracker(
            context.work / METRICS_FILE,
            mode=tuning.wandb,
            folder=context.logs,
            config=asdict(config),
            step=start.step,
            log=context.log,
        )
        begun, tokens = time.monotonic(), tuning.batch_size * config.data.sequence_length
        last: dict[str, float] = {}
        with context.progress.task("finetune", total=trainer.steps, unit="steps", done=start.step) as task:

            def finished(step: int, metrics: dict[str, float]) -> None:
                last.update(metrics)
                if tracker:
                    tracker.log(step, metrics)
                task.advance(1, tokens=tokens, note=f"loss {metrics['loss_full']:.3f} kl {metrics['kl_dial']:.3f}")
                if (step + 1) % tuning.save_every == 0 and step + 1 < trainer.steps:
                    elapsed = start.seconds + time.monotonic() - begun
                    save_state(context.work, engine, Position(step + 1, trainer.drift, elapsed))

            trainer.run(start.step, finished)
        if tracker:
            tracker.close()
        seconds = start.seconds + time.monotonic() - begun
        write_checkpoint(engine, context)
        metrics: dict[str, Any] = {name: last[name] for name in ("loss_full", "kl_dial") if name in last}
        return metrics | {
            "steps": trainer.steps,
            "tokens": trainer.steps * tokens,
            "tokens_per_s": round(trainer.steps * tokens / max(seconds, 1e-9), 1),
        }


def _steps(tuning: FinetuneConfig, config: RunConfig) -> int:
    return max(1, math.floor(tuning.tokens / (tuning.batch_size * config.data.sequence_length)))


def training_windows(context: StageContext, vocabulary: int, max_positions: int) -> Windows:
    """Windows of the training split, as many tokens as the run wants or the text has."""
    from dynaconv.data.corpus import load_corpus
    from dynaconv.data.tokenizer import load_tokenizer

    corpus = load_corpus(
        context.config.data,
        load_tokenizer(context.inputs["dynamic"]),
        train_tokens=context.config.finetune.tokens,
        validation_tokens=0,
        max_positions=max_positions,
        vocabulary=vocabulary,
        accept_less=True,
        say=context.progress.say,
    )
    return corpus.train


def routed_model(folder: Path, tuning: FinetuneConfig) -> Any:
    """The carved model in fp32 with the routers that ``tuning`` trains.

    ``curve`` routers start from the closed-form ones, the others silent: every token alike.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from dynaconv.artifacts.tensors import read_tensors
    from dynaconv.dynamic.layout import ROUTER_FILE, Layout, RouterLayout
    from dynaconv.dynamic.modeling import attach

    layout = Layout.load(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rank = tuning.router_rank or 64 * math.ceil(stock.config.hidden_size / 16 / 64)
    kind = "none" if tuning.router == "uniform" else tuning.router
    wanted = RouterLayout(
        kind=kind,
        linear=kind in ("curve", "class"),
        rank=0 if kind == "none" else rank,
        bound=tuning.bound,
    )
    model = attach(stock, replace(layout, router=wanted, dial=None, frontier={}))
    if kind == "curve" and layout.router.kind == "curve":
        known = read_tensors(folder / ROUTER_FILE)
        for ffn in model.ffns():
            prefix = f"layers.{ffn.layer}.router."
            own = {name.removeprefix(prefix): value for name, value in known.items() if name.startswith(prefix)}
            ffn.router.load_state_dict(own, strict=False)
    return model


def frozen_parent(folder: Path, device: Any) -> Any:
    """The dense checkpoint, without gradients, in its own dtype."""
    from transformers import AutoModelForCausalLM

    parent = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
    return parent.requires_grad_(False)


def write_checkpoint(engine: Engine, context: StageContext) -> None:
    """The tuned tensors under the parent's names and dtypes, routers and layout beside them. Every rank takes part."""
    if not engine.ranks.main:
        for _ in engine.weights():  # hands over this rank's parts
            pass
        return
    from dynaconv.arch.checkpoint import Checkpoint, copy_side_files
    from dynaconv.arch.stock import stock_names
    from dynaconv.artifacts.writer import CheckpointWriter, write_tensors
    from dynaconv.dynamic.layout import ROUTER_FILE

    carved, folder, model = context.inputs["dynamic"], context.folder, engine.network
    checkpoint, routers = Checkpoint.open(carved), router_names(model)
    layout = [(info.name, info.dtype, info.shape) for info in checkpoint.reader.tensors.values()]
    names = stock_names(checkpoint, model)
    tuned = {}
    with CheckpointWriter(folder, layout, shard_bytes=context.config.carve.shard_bytes) as writer:
        for name, tensor in engine.weights():
            for stored, dtype, _ in layout:
                if names[stored] == name:
                    writer.write(stored, tensor.to("cpu", dtype))
            if name in routers:
                tuned[routers[name]] = tensor.cpu().clone()
    copy_side_files(carved, folder)
    shutil.copyfile(carved / "config.json", folder / "config.json")
    model.layout.save(folder)
    if model.layout.router.kind != "none":
        write_tensors(folder / ROUTER_FILE, tuned)
    shutil.copy(context.work / METRICS_FILE, folder / METRICS_FILE)


def router_names(model: Any) -> dict[str, str]:
    """What :meth:`router_state` calls the router parameters, by the model's own names."""
    places = {id(module): name for name, module in model.named_modules()}
    return {
        f"{places[id(ffn)]}.router.{name}": f"layers.{ffn.layer}.router.{name}"
        for ffn in model.ffns()
        for name, _ in ffn.router.named_parameters()
    }
