"""The ``calibrate`` stage: thresholds for a grid of budgets, and the measured frontier."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from dynaconv.artifacts.files import storage_errors
from dynaconv.artifacts.source import shown_name
from dynaconv.config import RunConfig
from dynaconv.pipeline.stage import Dense, Estimate, Stage, StageContext


class CalibrateStage(Stage):
    """Solves and measures the dial on text that was never trained on."""

    name = "calibrate"
    consumes = ("parent", "dynamic")
    produces = "dials"
    distributed = True
    sections = ("seed", "data", "sketch", "calibrate")

    def estimate(self, config: RunConfig, source: Dense, parent: Dense | None = None) -> Estimate:
        """Parent and dynamic model side by side, the logits of one batch, and the routers' scores."""
        from dynaconv.arch.blocks import ffn_partition
        from dynaconv.arch.checkpoint import Checkpoint
        from dynaconv.calibrate.solve import KEPT_SCORES
        from dynaconv.calibrate.sweep import HIGH, NEURONS

        checkpoint, dense = Checkpoint.open(source), Checkpoint.open(parent or source)
        settings = config.calibrate
        batch = settings.batch_size * config.data.sequence_length
        logits = 3 * 4 * batch * checkpoint.sizes["vocab"]
        features = ffn_partition(checkpoint.sizes["ffn"], config).blocks if config.experts == "routed" else 1
        scores = 2 * 4 * min(KEPT_SCORES, settings.tokens * checkpoint.layers * features)  # by batch, and put together
        budgets = len(NEURONS + HIGH if settings.budgets is None else settings.budgets)
        passes = 4 * budgets * settings.tokens + 2 * (budgets + 2) * settings.score_tokens
        ffns = checkpoint.dtype.itemsize * checkpoint.layers * checkpoint.ffn_parameters
        copies = ffns * (1 + (config.sketch.values == "mixed")) if config.experts == "neurons" else 0
        return Estimate(
            peak_bytes=checkpoint.reader.total_bytes + dense.reader.total_bytes + copies + logits + scores,
            disk_bytes=200_000,
            flops=2.0 * checkpoint.parameters * passes,
            notes=(f"up to {budgets + 1} budgets",),
        )

    def run(self, context: StageContext) -> dict[str, Any]:
        """Writes ``dynaconv.json`` with the dial, ``frontier.json`` and ``frontier.png``."""
        from dynaconv.arch.checkpoint import Checkpoint
        from dynaconv.arch.stock import load_dense
        from dynaconv.artifacts.tensors import write_tensors
        from dynaconv.calibrate.sweep import grid, measure, neuron_table, thresholds_for, uniform_table
        from dynaconv.dynamic.layout import ROUTER_FILE
        from dynaconv.dynamic.modeling import load
        from dynaconv.dynamic.routers.kinds import KINDS
        from dynaconv.evaluation.cost import CostModel
        from dynaconv.evaluation.plots import draw_frontier
        from dynaconv.frontier import FRONTIER_FILE, PICTURE_FILE
        from dynaconv.profile.gated import prepare_means

        config, settings, data = context.config, context.config.calibrate, context.config.data
        ranks, device = context.ranks, context.ranks.device
        model = load(context.inputs["dynamic"]).to(device).eval()
        parent = load_dense(context.inputs["parent"], device)
        text = held_out(context, model.config).own(ranks)
        checkpoints = Checkpoint.open(context.inputs["parent"]), Checkpoint.open(context.inputs["dynamic"])
        parent_cost, own_cost = (CostModel.of(each, context=data.sequence_length // 2) for each in checkpoints)
        budgets, neurons = grid(model, settings), KINDS[model.layout.router.kind].experts == "neurons"
        settings = replace(settings, budgets=budgets)
        measured = neurons and config.sketch.means and not model.layout.means  # what fine-tuning has trained is kept
        if neurons and config.sketch.means:
            prepare_means(model, budgets)
        with context.progress.task("calibrate", total=2 * len(budgets) + 1, unit="budgets") as task:
            if neurons:
                table = neuron_table(model, text, settings, task, ranks, measure_means=measured)
            elif model.layout.router.kind != "none":
                table = thresholds_for(model, text, settings, task, ranks)
            else:
                table = uniform_table(model.layout, budgets)
            model.layout = model.layout.with_dial(table, None)
            frontier = measure(model, parent, text, (parent_cost, own_cost), settings.speed_tokens, task, ranks)
        if ranks.main:
            with storage_errors(context.folder):
                model.layout.with_dial(table, frontier).save(context.folder)
                if model.layout.means:
                    write_tensors(context.folder / ROUTER_FILE, model.router_state())
                frontier.save(context.folder / FRONTIER_FILE)
            name = shown_name(context.config.source)
            draw_frontier(frontier, context.folder / PICTURE_FILE, name=name)
        return {
            "parent_loss": frontier.parent.loss,
            "quality": {f"{point.budget:g}": round(point.quality, 4) for point in frontier.points},
        }


def held_out(context: StageContext, model_config: Any) -> Any:
    """Windows that were not trained on, cut in two: to solve on, and to score on.

    Where there is less than the recipe asks for, both parts shrink alike.
    """
    from dynaconv.calibrate.sweep import Text
    from dynaconv.data.corpus import load_corpus
    from dynaconv.data.tokenizer import load_tokenizer
    from dynaconv.data.windows import evaluation_batches
    from dynaconv.errors import DataError

    settings, data, seed = context.config.calibrate, context.config.data, context.config.seed
    wanted = settings.tokens + settings.score_tokens
    windows = load_corpus(
        data,
        load_tokenizer(context.inputs["dynamic"]),
        train_tokens=0,
        validation_tokens=wanted,
        max_positions=model_config.max_position_embeddings,
        vocabulary=model_config.vocab_size,
        accept_less=True,
        say=context.progress.say,
    ).validation
    if len(windows) < 2:
        raise DataError(
            "not enough held-out text to calibrate on",
            where="data.validation",
            expected=f"two windows of {data.sequence_length} tokens or more",
            found=f"{windows.total_tokens} tokens",
            hint="raise data.validation_share, lower data.sequence_length, or give data.validation",
        )
    part = settings.tokens / wanted
    count = min(len(windows), math.ceil(wanted / data.sequence_length))
    first = min(count - 1, max(1, round(count * part))) * data.sequence_length
    return Text(
        solve=list(evaluation_batches(windows, settings.batch_size, first, seed)),
        score=list(
            evaluation_batches(
                windows, settings.batch_size, count * data.sequence_length - first, seed, skip_tokens=first
            )
        ),
    )
