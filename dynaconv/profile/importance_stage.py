"""importance: calibration text through the parent, layer by layer; what a resize to a smaller shape needs comes out.

:mod:`dynaconv.profile.importance` says what is measured and how it is stored.
"""

from __future__ import annotations

import math
import time
from typing import Any

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.config import RunConfig
from dynaconv.errors import CheckpointError
from dynaconv.pipeline.stage import Dense, Estimate, Stage, StageContext
from dynaconv.profile.calibration import calibration_batches


class ImportanceStage(Stage):
    """Dense checkpoint in, importance of its neurons, heads, residual channels and layers out."""

    name = "importance"
    consumes = ("dense",)
    produces = "importance"
    sections = ("seed", "data", "importance")

    def estimate(self, config: RunConfig, source: Dense, parent: Dense | None = None) -> Estimate:
        """Peak memory on the CPU, disk, and FLOPs, from the headers of the checkpoint.

        Raises:
            CheckpointError: ``source`` is not a checkpoint that can be measured.
        """
        from dynaconv.profile.cost import importance_estimate
        from dynaconv.profile.importance import tensor_layout
        from dynaconv.profile.statistics import layout_bytes

        checkpoint = Checkpoint.open(source)
        layout = tensor_layout(checkpoint, second_moments=config.importance.second_moments)
        return importance_estimate(config, checkpoint, layout_bytes(layout))

    def run(self, context: StageContext) -> dict[str, Any]:
        """Writes the importance; returns tokens, loss, speed and each layer's influence.

        Raises:
            CheckpointError: The checkpoint or its tokenizer is damaged or not supported; NaN in a weight names it.
            DataError: The calibration text is missing or too small.
            ArtifactError: The folder cannot be written.
        """
        from dynaconv.profile.importance import measure_importance
        from dynaconv.profile.streaming import LayerStream

        config, started, folder = context.config, time.monotonic(), context.inputs["dense"]
        checkpoint = Checkpoint.open(folder)
        batches, digest = calibration_batches(
            checkpoint, context, tokens=config.importance.tokens, batch_size=config.importance.batch_size
        )
        stream = LayerStream(checkpoint, trust_remote_code=config.trust_remote_code)
        context.log.info("importance: computing in %s on %s", stream.dtype, stream.device)
        steps = checkpoint.layers * len(batches)
        with context.progress.task("importance", steps, "batches") as task:
            summary = measure_importance(
                stream,
                batches,
                context.folder,
                second_moments=config.importance.second_moments,
                data=digest,
                seed=config.seed,
                finished=lambda layer, batch: task.advance(
                    tokens=batch.tokens / checkpoint.layers, note=f"layer {layer + 1} of {checkpoint.layers}"
                ),
            )
            task.advance(0, note=f"loss {summary.loss:.3f}")
        if not math.isfinite(summary.loss):
            found = f"{summary.loss} nats a token, computed in {stream.dtype}"
            raise CheckpointError("the model's loss on the calibration text is not finite", where=folder, found=found)
        return {
            "tokens": summary.tokens,
            "loss": summary.loss,
            "tokens_per_s": summary.tokens / (time.monotonic() - started),
            "influence": list(summary.influence),
            "second_moments": summary.second_moments,
        }
