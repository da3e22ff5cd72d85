"""carve: puts the neurons of each FFN in order, cuts them into blocks, and makes routers without training.

What comes out is the parent with its neurons permuted: the same config.json, the same tensor names, the same function.
Blocks and routers lie beside it (dynaconv.json, dynaconv.safetensors). D residual width, F neurons, N blocks.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from dynaconv.arch.blocks import ffn_partition, partition_text
from dynaconv.arch.checkpoint import CONFIG_FILE, Checkpoint, copy_side_files, side_files
from dynaconv.arch.surgery import Take, transform, transform_peak_bytes
from dynaconv.artifacts.files import size_text, storage_errors
from dynaconv.artifacts.tensors import write_tensors
from dynaconv.config import RunConfig
from dynaconv.convert.measured import Measured
from dynaconv.convert.ridge import ridge_peak_bytes, solve_ridge
from dynaconv.dynamic.layout import ROUTER_FILE, CopyLayout, FFNLayout, Layout, RouterLayout
from dynaconv.dynamic.routers.kinds import KINDS
from dynaconv.pipeline.stage import TORCH_BYTES, Dense, Estimate, Stage, StageContext


class CarveStage(Stage):
    """Dense checkpoint and statistics in, dynamic checkpoint out. Exact at full dial; nothing is trained."""

    name = "carve"
    consumes = ("dense", "statistics")
    produces = "dynamic"
    sections = ("experts", "blocks", "block_size", "sketch", "carve")
    library_bytes = TORCH_BYTES

    def estimate(self, config: RunConfig, source: Dense, parent: Dense | None = None) -> Estimate:
        """Peak memory and disk, from the headers of the checkpoint.

        Raises:
            CheckpointError: ``source`` is not a checkpoint that can be carved.
            ConfigError: ``blocks`` or ``block_size`` does not fit its FFNs.
        """
        checkpoint = Checkpoint.open(source)
        partition = ffn_partition(checkpoint.sizes["ffn"], config)
        residual, layers = checkpoint.sizes["residual"], checkpoint.layers
        sketched = config.experts == "neurons"
        routers = 4 * layers * (partition.neurons + 1 if sketched else partition.blocks * (residual + 1))
        orders = 8 * layers * checkpoint.sizes["ffn"]
        solving = 0 if sketched else ridge_peak_bytes(residual, partition.blocks)
        weights = sum(checkpoint.reader.tensors[name].nbytes for name in checkpoint.slots)
        sides = sum(path.stat().st_size for path in side_files(checkpoint.folder))
        return Estimate(
            peak_bytes=routers + orders + max(solving, transform_peak_bytes(checkpoint, {"ffn"})),
            disk_bytes=weights + routers + sides,
            flops=0.0 if sketched else layers * residual**2 * (residual / 3 + 2.0 * partition.blocks),
            notes=(partition_text(layers, partition),),
        )

    def run(self, context: StageContext) -> dict[str, Any]:
        """Writes the carved checkpoint; returns the blocks, the neurons moved and the importance of the first half.

        Raises:
            CheckpointError: The checkpoint is damaged or not supported, or a weight is NaN or infinite.
            StaleArtifactError: The statistics are not of this checkpoint or these blocks.
            ArtifactError: The statistics are damaged, or the folder cannot be written.
        """
        checkpoint = Checkpoint.open(context.inputs["dense"])
        config = context.config
        partition = ffn_partition(checkpoint.sizes["ffn"], config)
        measured = Measured.open(context.inputs["statistics"], checkpoint, partition, config.experts)
        context.log.info("carve: %s", partition_text(measured.layers, partition))
        orders = {layer: measured.order(layer) for layer in range(checkpoint.layers)}
        routers = _routers(measured, context)
        _stream_weights(checkpoint, orders, context)
        with storage_errors(context.folder):
            shutil.copyfile(checkpoint.folder / CONFIG_FILE, context.folder / CONFIG_FILE)
            copy_side_files(checkpoint.folder, context.folder)
            write_tensors(context.folder / ROUTER_FILE, routers)
            ffn = FFNLayout(**asdict(checkpoint.family.ffn))
            router, copy = _router_layout(config)
            itemsize = checkpoint.dtype.itemsize
            Layout(partition, checkpoint.layers, ffn, router, copy=copy, itemsize=itemsize).save(context.folder)
        return _metrics(measured, orders)


def _router_layout(config: RunConfig) -> tuple[RouterLayout, CopyLayout | None]:
    """The routers that need no training, and the few-bit copy of the weights that they may need."""
    if config.experts == "neurons":
        sketch = config.sketch
        mixed = sketch.values == "mixed"
        bits = sketch.low_bits if mixed else sketch.bits
        router = RouterLayout("sketch", bits=sketch.bits, coarse=sketch.coarse_bits, reach=sketch.reach)
        return router, CopyLayout(bits, sketch.group, values=mixed)
    kind = next(kind for kind in KINDS.values() if kind.closed_form and kind.experts == config.experts)
    return RouterLayout(kind=kind.kind, linear=True, bound=kind.default_bound), None


def _routers(measured: Measured, context: StageContext) -> dict[str, Tensor]:
    """Tensors of every layer's router, by the names dynaconv.safetensors uses."""
    if context.config.experts == "neurons":
        return {
            f"layers.{layer}.router.{name}": tensor
            for layer in range(measured.layers)
            for name, tensor in measured.sketched(layer).items()
        }
    return _solve_routers(measured, context)


def _solve_routers(measured: Measured, context: StageContext) -> dict[str, Tensor]:
    """Weights (N, D) and biases (N,) of every layer's router, fp32, by the names dynaconv.safetensors uses.

    Scores of routed experts are taken relative to their mean in the layer, since norms of layers do not compare.
    """
    routers: dict[str, Tensor] = {}
    with context.progress.task("routers", total=measured.layers, unit="layers") as task:
        for layer in range(measured.layers):
            gram, target = measured.sums(layer)
            weight, bias = solve_ridge(gram, target, context.config.carve.ridge)
            if context.config.experts == "routed":
                bias -= (target[-1].double() / gram[-1, -1].double()).mean()
            routers[f"layers.{layer}.router.linear.weight"] = weight.float()
            routers[f"layers.{layer}.router.linear.bias"] = bias.float()
            task.advance(1)
    return routers


def _stream_weights(checkpoint: Checkpoint, orders: dict[int, Tensor], context: StageContext) -> None:
    """The parent's weights into the staging folder, their FFN neurons in the new order."""
    total = sum(checkpoint.reader.tensors[name].nbytes for name in checkpoint.slots)
    context.log.info("writing %s of weights", size_text(total))
    with context.progress.task("carve", total=len(checkpoint.slots), unit="tensors") as task:
        transform(
            checkpoint,
            [Take("ffn", orders)],
            context.folder,
            shard_bytes=context.config.carve.shard_bytes,
            advance=lambda info: task.advance(1, note=info.name),
        )


def _metrics(measured: Measured, orders: dict[int, Tensor]) -> dict[str, Any]:
    """What the manifest says of a carved checkpoint."""
    partition = measured.partition
    half = partition.edges[partition.blocks // 2]
    moved, shares = 0, []
    for layer, order in orders.items():
        moved += int((order != torch.arange(partition.neurons)).sum())
        ordered = measured.importance(layer)[order].double()
        shares.append(float(ordered[:half].sum() / ordered.sum().clamp_min(torch.finfo(torch.float64).tiny)))
    return {
        "layers": measured.layers,
        "blocks": partition.blocks,
        "block_size": max(partition.sizes),
        "neurons_moved": moved,
        "importance_of_first_half": sum(shares) / len(shares),
    }
