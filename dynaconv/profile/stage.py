"""profile: calibration text through the parent, layer by layer; what carve and the routers need to know comes out."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from dynaconv.arch.blocks import ffn_partition, partition_text
from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.config import RunConfig
from dynaconv.errors import CheckpointError, DataError
from dynaconv.pipeline.stage import Dense, Estimate, Stage, StageContext
from dynaconv.profile.calibration import calibration_batches

if TYPE_CHECKING:
    import torch

    from dynaconv.kernels.partition import Partition
    from dynaconv.profile.measure import Sample
    from dynaconv.profile.streaming import LayerStream


class ProfileStage(Stage):
    """Dense checkpoint in, statistics out: importance of neurons, difficulty curves, sums for closed-form routers."""

    name = "profile"
    consumes = ("dense",)
    produces = "statistics"
    distributed = True
    sections = ("experts", "blocks", "block_size", "seed", "data", "profile")

    def estimate(self, config: RunConfig, source: Dense, parent: Dense | None = None) -> Estimate:
        """Peak memory on the CPU, disk, and FLOPs, from the headers of the checkpoint.

        Raises:
            CheckpointError: ``source`` is not a checkpoint that can be profiled.
            ConfigError: ``blocks`` or ``block_size`` does not fit its FFNs.
        """
        from dynaconv.profile.cost import profile_estimate

        return profile_estimate(config, Checkpoint.open(source))

    def run(self, context: StageContext) -> dict[str, Any]:
        """Writes the statistics; returns tokens, loss, speed, and how much the first half of the blocks loses.

        Raises:
            CheckpointError: The checkpoint or its tokenizer is damaged or not supported; NaN in a weight names it.
            ConfigError: ``blocks`` or ``block_size`` does not fit its FFNs.
            DataError: The calibration text is missing or too small.
            ArtifactError: The folder cannot be written.
        """
        from dynaconv.profile.curves import curve_widths
        from dynaconv.profile.statistics import Summary
        from dynaconv.profile.streaming import LayerStream, quick_dtype

        config, started = context.config, time.monotonic()
        folder = context.inputs["dense"]
        checkpoint = Checkpoint.open(folder)
        partition = ffn_partition(checkpoint.sizes["ffn"], config)
        context.log.info("profile: %s", partition_text(checkpoint.layers, partition))
        whole, digest = _sample(checkpoint, context)
        sample = whole.own(context.ranks).in_pieces()
        device = context.ranks.device
        dtype = quick_dtype(checkpoint, device)
        stream = LayerStream(checkpoint, device, dtype=dtype, trust_remote_code=config.trust_remote_code)
        context.log.info("profile: computing in %s on %s", stream.dtype, stream.device)
        sensitivity = _sensitivity(stream, sample, context) if config.profile.loss_aware else None
        loss, half = _stream(stream, sample, partition, sensitivity, context)
        if not math.isfinite(loss):
            found = f"{loss} nats a token, computed in {stream.dtype}"
            raise CheckpointError("the model's loss on the calibration text is not finite", where=folder, found=found)
        summary = Summary(
            tokens=whole.tokens,
            curve_tokens=whole.curve_tokens,
            layers=checkpoint.layers,
            partition=partition,
            curve_widths=() if config.experts == "neurons" else curve_widths(partition, config.experts),
            loss=loss,
            experts=config.experts,
            order=config.profile.order,
            loss_aware=config.profile.loss_aware,
            data=digest,
            seed=config.seed,
            dtype=str(stream.dtype).removeprefix("torch."),
        )
        if context.ranks.main:
            summary.save(context.folder)
        return {
            "tokens": whole.tokens,
            "loss": loss,
            "tokens_per_s": whole.tokens / (time.monotonic() - started),
            **({} if half is None else {"half_width_error": half}),
            "curve_share": whole.curve_tokens / whole.tokens,
            "blocks": partition.blocks,
            "block_size": max(partition.sizes),
        }


def _sample(checkpoint: Checkpoint, context: StageContext) -> tuple[Sample, str]:
    """Calibration batches of the training side of the text, and the text's digest."""
    from dynaconv.profile.measure import Sample

    config = context.config
    batches, digest = calibration_batches(
        checkpoint, context, tokens=config.profile.tokens, batch_size=config.profile.batch_size
    )
    sample = Sample.of(batches, config.profile.curve_share)
    if not sample.curve_tokens:
        found = "documents of one token"
        raise DataError("there is no text to measure on", where=f"data={config.data.train}", found=found)
    return sample, digest


def _sensitivity(stream: LayerStream, sample: Sample, context: StageContext) -> torch.Tensor:
    """Sensitivity of the loss to errors, (L, curve tokens): the backward pass."""
    from dynaconv.profile.loss_aware import loss_weights

    with context.progress.task("profile: loss", total=sample.curve_tokens, unit="tokens") as task:
        return loss_weights(
            stream,
            sample,
            trust_remote_code=context.config.trust_remote_code,
            finished=lambda batch, tokens: task.advance(tokens, tokens=tokens),
            ranks=context.ranks,
        )


def _stream(
    stream: LayerStream, sample: Sample, partition: Partition, sensitivity: torch.Tensor | None, context: StageContext
) -> tuple[float, float | None]:
    """Measures and writes layer by layer; the parent's loss, and the mean error at half width over layers.

    There are no widths, and no error, where experts are single neurons.
    """
    import torch

    from dynaconv.data.windows import scored_tokens
    from dynaconv.profile.curves import curve_widths
    from dynaconv.profile.measure import measure_layer
    from dynaconv.profile.statistics import open_writer, tensor_layout

    layers, half = stream.checkpoint.layers, []
    widths = () if context.config.experts == "neurons" else curve_widths(partition, context.config.experts)
    experts = context.config.experts
    layout = tensor_layout(layers, stream.checkpoint.sizes["residual"], partition, widths, experts)
    steps, ranks = layers * len(sample.batches), context.ranks
    place = open_writer(context.folder, layout) if ranks.main else nullcontext(None)
    with place as writer, context.progress.task("profile", steps, "batches") as task:
        hidden = stream.embed(sample.batches)
        for index in range(layers):
            task.advance(0, note=f"layer {index + 1} of {layers}")
            measured = measure_layer(
                stream,
                index,
                hidden,
                sample,
                order=context.config.profile.order,
                partition=partition,
                experts=experts,
                weights=None if sensitivity is None else sensitivity[index],
                finished=lambda batch: task.advance(tokens=ranks.world * batch.tokens / layers),
                ranks=ranks,
            )
            if writer is not None:
                for name, tensor in measured.items():
                    writer.write(f"layers.{index}.{name}", tensor)
            if "curve_mean" in measured:
                half.append(float(measured["curve_mean"][len(widths) // 2]))
        scored = sum(int(scored_tokens(batch).sum()) for batch in sample.batches)
        own = torch.tensor(stream.loss(hidden, sample.batches), dtype=torch.float64)
        loss = ranks.mean(own, scored).item()
        task.advance(0, note=f"loss {loss:.3f}")
    return loss, sum(half) / len(half) if half else None
