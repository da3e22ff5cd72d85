"""The ``finetune`` stage: a carved checkpoint in, the same with tuned weights and trained routers out."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from dynaconv.artifacts.files import require_space
from dynaconv.config import RunConfig
from dynaconv.errors import ConfigError
from dynaconv.pipeline.stage import Dense, Estimate, Stage, StageContext

if TYPE_CHECKING:
    from dynaconv.data.windows import Windows
    from dynaconv.train.state import Position
    from dynaconv.train.step import Trainer

METRICS_FILE = "metrics.jsonl"


class FinetuneStage(Stage):
    """Trains weights and routers at sampled budgets; resumes in the middle, exactly."""

    name = "finetune"
    consumes = ("parent", "dynamic")
    produces = "dynamic"
    invalidates = ("dials",)
    distributed = True
    sections = ("seed", "data", "finetune")
    unfingerprinted = tuple(f"finetune.{name}" for name in ("explosion", "save_every", "statistics_every", "wandb"))

    def problems(self, config: RunConfig) -> list[str]:
        """Routers and losses that do not fit, missing packages, DeepSpeed settings that contradict the recipe."""
        from importlib.util import find_spec

        from dynaconv.train.deepspeed_config import deepspeed_config
        from dynaconv.train.objectives.validity import problems_of_losses
        from dynaconv.train.router_kinds import problems_of_router

        found, engine = list(problems_of_router(config)), config.engine
        found += [] if found else problems_of_losses(config.finetune)
        if config.finetune.trainable == "lora" and find_spec("peft") is None:
            found.append("finetune.trainable is 'lora', which needs peft: pip install 'dynaconv[lora]'")
        if engine.kind == "deepspeed" and find_spec("deepspeed") is None:
            found.append("engine.kind is 'deepspeed', which is not installed: pip install 'dynaconv[deepspeed]'")
        if engine.kind == "deepspeed" and engine.deepspeed_config is not None:
            try:
                deepspeed_config(config, engine.nproc)
            except ConfigError as error:
                found.append(str(error))
        return found

    def estimate(self, config: RunConfig, source: Dense, parent: Dense | None = None) -> Estimate:
        """What training takes on one device, with the parent that teaches beside it."""
        from dynaconv.arch.checkpoint import Checkpoint
        from dynaconv.train.estimate import finetune_estimate

        return finetune_estimate(config, Checkpoint.open(source), Checkpoint.open(parent or source))

    def run(self, context: StageContext) -> dict[str, Any]:
        """Trains from the last saved state to the end, then writes the checkpoint."""
        import torch

        from dynaconv.arch.stock import load_dense
        from dynaconv.train.budget_controller import BudgetController
        from dynaconv.train.engine import build_engine
        from dynaconv.train.model import trainable_model, write_checkpoint
        from dynaconv.train.neurons import prepare_neurons, training_budgets
        from dynaconv.train.objectives.registry import needs_parent
        from dynaconv.train.sampler import steps_of
        from dynaconv.train.state import has_state, load_state
        from dynaconv.train.step import Trainer
        from dynaconv.train.tracking import recorded
        from dynaconv.train.watch import Watch, memory_errors, watched

        config, tuning, metrics_file = context.config, context.config.finetune, context.work / METRICS_FILE
        steps = steps_of(config)
        torch.manual_seed(config.seed)
        ranks = context.ranks
        with memory_errors(config, ranks.world):
            network = trainable_model(context.inputs["dynamic"], tuning)
            tuning = replace(tuning, budgets=training_budgets(network, tuning))
            windows = training_windows(context, network.config.vocab_size, network.config.max_position_embeddings)
            margin = 0.0
            if network.layout.copy is not None:
                margin = prepare_neurons(network, windows, tuning, context, measured=not has_state(context.work))
            if not ranks.main:
                torch.manual_seed(config.seed + (ranks.rank << 32))  # another dropout on each rank
            require_space(context.work, 2 * 12 * sum(p.numel() for p in network.parameters() if p.requires_grad))
            engine = build_engine(network, config, ranks)
            parent = load_dense(context.inputs["parent"], ranks.device) if needs_parent(tuning) else None
            start = load_state(context.work, engine)
            if start.step:
                context.log.info("resuming after step %d of %d", start.step, steps)
            seen = [watched(line) for line in recorded(metrics_file)[: start.step]] if ranks.main else []
            watch = Watch(tuning.explosion, ranks.broadcast_object(seen))
            controller = BudgetController(start.budget_error)
            trainer = Trainer(engine, tuning, windows, steps, config.seed, parent, controller, watch, margin)
            seconds = train(trainer, context, start)
        write_checkpoint(engine, context.inputs["dynamic"], context.folder, config.carve.shard_bytes)
        if not ranks.main:
            return {}
        shutil.copy(metrics_file, context.folder / METRICS_FILE)
        last, tokens = recorded(metrics_file)[-1], steps * tuning.batch_size * config.data.sequence_length
        return {name: last[name] for name in ("loss_full", "loss_dial", "kl_dial") if name in last} | {
            "steps": steps,
            "tokens": tokens,
            "tokens_per_s": round(tokens / max(seconds, 1e-9), 1),
        }


def train(trainer: Trainer, context: StageContext, start: Position) -> float:
    """Trains to the end, recording every step and saving the state now and then; seconds in all.

    Raises:
        KeyboardInterrupt: A signal to end came; the state is saved.
    """
    import torch

    from dynaconv.train.state import Position, save_state
    from dynaconv.train.tracking import Tracker
    from dynaconv.train.watch import ending

    config, engine, begun = context.config, trainer.engine, time.monotonic()
    tuning, tokens = config.finetune, config.finetune.batch_size * config.data.sequence_length
    tracker = engine.ranks.main and Tracker(
        context.work / METRICS_FILE,
        mode=tuning.wandb,
        folder=context.logs,
        config=asdict(config),
        step=start.step,
        log=context.log,
    )
    total = trainer.steps
    with ending() as asked, context.progress.task("finetune", total=total, unit="steps", done=start.step) as task:

        def finished(step: int, metrics: dict[str, float]) -> None:
            if tracker:
                tracker.log(step, metrics)
            task.advance(1, tokens=tokens, note=_note(metrics))
            end = float(engine.ranks.sum(torch.tensor(float(asked())))) > 0
            if end or ((step + 1) % tuning.save_every == 0 and step + 1 < total):
                elapsed = start.seconds + time.monotonic() - begun
                save_state(context.work, engine, Position(step + 1, trainer.controller.error, elapsed))
            if end:
                context.log.info("asked to end: saved the state after step %d of %d", step + 1, total)
                raise KeyboardInterrupt

        try:
            trainer.run(start.step, finished)
        finally:
            if tracker:
                tracker.close()
    return start.seconds + time.monotonic() - begun


def _note(metrics: dict[str, float]) -> str:
    shown = {"loss": "loss_full", "dial": "loss_dial", "kl": "kl_dial"}
    return " ".join(f"{short} {metrics[name]:.3f}" for short, name in shown.items() if name in metrics)


def training_windows(context: StageContext, vocabulary: int, max_positions: int) -> Windows:
    """Windows of the training split, as many tokens as the run wants or the text has.

    The tokens lie on disk until the stage is done: a run that goes on, and every rank, find them there.
    """
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
        folder=context.work / "tokens",
    )
    return corpus.train
