"""The stages ``subclone`` and ``hyperclone``: a dense checkpoint in, a smaller or a larger one out.

Both decide by a pure function, stream the weights through surgery, write a model card, and end with a comparison of
source and result on the same tokens, which goes into the manifest.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaconv.arch.checkpoint import Checkpoint, side_files
from dynaconv.arch.surgery import transform_peak_bytes
from dynaconv.artifacts.files import atomic_write, size_text
from dynaconv.artifacts.source import shown_name
from dynaconv.config import RunConfig
from dynaconv.convert.pace import expected_seconds
from dynaconv.convert.resize import Resize, dimensions, write_resized
from dynaconv.convert.resize_card import CARD_FILE, resize_card
from dynaconv.dynamic.layout import LAYOUT_FILE
from dynaconv.errors import QualityError
from dynaconv.pipeline.stage import Dense, Estimate, Stage, StageContext
from dynaconv.rules import SUBCLONE_SIZES

if TYPE_CHECKING:
    from dynaconv.convert.importance import Importance
    from dynaconv.data.windows import Batch

WINDOWS, LENGTH = 2, 64  # of the comparison
WORD = 4
# Largest difference of logits over the largest logit. Weights in 16 bits are rounded once more where copies differ.
TOLERANCE = {4: 1e-4, 2: 5e-2}


class ResizeStage(Stage):
    """What both have in common."""

    produces = "dense"
    invalidates = ("importance", "statistics", "dynamic", "dials", "model")

    @abstractmethod
    def decide(self, checkpoint: Checkpoint, config: RunConfig, importance: Path | None) -> Resize:
        """How ``checkpoint`` is resized.

        Args:
            checkpoint: The source.
            config: The recipe.
            importance: What was measured of it; ``None`` before, when all is taken to matter alike.

        Raises:
            ConfigError: What is wanted cannot be.
        """

    @abstractmethod
    def shard_bytes(self, config: RunConfig) -> int:
        """Largest shard that is written."""

    @abstractmethod
    def batches(self, checkpoint: Checkpoint, context: StageContext) -> Sequence[Batch]:
        """What source and result are compared on."""

    def method_peak_bytes(self, checkpoint: Checkpoint, result: Checkpoint, config: RunConfig) -> int:
        """Memory that the method itself takes at its most, beside reading and writing."""
        return 0

    def judge(self, relative: float, itemsize: int) -> None:
        """Stops where the difference of logits is not what the method promises."""

    def resized(self, config: RunConfig, source: Dense) -> Dense:
        """The shape of the result."""
        checkpoint = Checkpoint.open(source)
        return checkpoint.imagined(self.decide(checkpoint, config, None).config)

    def estimate(self, config: RunConfig, source: Dense, parent: Dense | None = None) -> Estimate:
        """Shape, disk, memory and time, from the headers; the pace is measured on a piece of the source.

        Raises:
            CheckpointError: ``source`` is not a checkpoint that can be resized.
            ConfigError: It cannot have the shape that is asked for.
        """
        checkpoint = Checkpoint.open(source)
        resize = self.decide(checkpoint, config, None)
        result = checkpoint.imagined(resize.config)
        old, new = dimensions(checkpoint), dimensions(result)
        changed = [f"{name} {old[name]} -> {new[name]}" for name in old if old[name] != new[name]]
        disk = result.reader.total_bytes + sum(path.stat().st_size for path in side_files(checkpoint.folder))
        tokens = WINDOWS * LENGTH
        flops = 2.0 * tokens * (checkpoint.parameters + result.parameters)
        forward = f"{2 * new['parameters'] / 1e9:.3g} GFLOPs a token instead of {2 * old['parameters'] / 1e9:.3g}"
        pace = expected_seconds(checkpoint, result) if isinstance(source, Path) else None
        return Estimate(
            peak_bytes=max(
                transform_peak_bytes(checkpoint, {take.axis for take in resize.takes}, result),
                _compare_peak_bytes(result, tokens),
                self.method_peak_bytes(checkpoint, result, config),
            ),
            disk_bytes=disk,
            flops=flops,
            notes=(
                ", ".join(changed) or "the shape stays",
                forward,
                *([f"about {in_words(pace)} at the pace of a piece of the source just now"] if pace else []),
                *(f"warning: {warning}" for warning in resize.warnings),
            ),
        )

    def run(self, context: StageContext) -> dict[str, Any]:
        """Writes the resized checkpoint, compares it with its source, and returns both shapes and the difference.

        Raises:
            ConfigError: What is wanted cannot be.
            CheckpointError: The checkpoint is damaged or not supported, or a weight is NaN or infinite.
            QualityError: The result is not what the method promises; nothing is published then.
            ArtifactError: The folder cannot be written.
        """
        config = context.config
        checkpoint = Checkpoint.open(context.inputs["dense"])
        resize = self.decide(checkpoint, config, context.inputs.get("importance"))
        self.tell(context, resize)
        if (checkpoint.folder / LAYOUT_FILE).is_file():
            context.progress.say(f"{self.name}  blocks, routers and dial of the source stay behind: carve the result")
        self._write(checkpoint, resize, context)
        result = Checkpoint.open(context.folder)
        comparison = self._compare(checkpoint, result, context)
        metrics = {
            "relative_difference": comparison["relative"],
            "source_loss": comparison["source_loss"],
            "result_loss": comparison["result_loss"],
            "agreement": comparison["agreement"],
            "parameters": result.parameters,
            "from": dimensions(checkpoint),
            "to": dimensions(result),
            "decided": dict(resize.summary),
            "comparison": comparison,
            "warnings": list(resize.warnings),
        }
        atomic_write(context.folder / CARD_FILE, resize_card(self.name, shown_name(config.source), metrics))
        return metrics

    def tell(self, context: StageContext, resize: Resize) -> None:
        """Says what the user should know before hours go by."""
        for warning in resize.warnings:
            context.progress.say(f"{self.name}  warning: {warning}")

    def _write(self, checkpoint: Checkpoint, resize: Resize, context: StageContext) -> None:
        total = checkpoint.imagined(resize.config).reader.total_bytes
        context.log.info("writing %s of weights", size_text(total))
        with context.progress.task(self.name, total=len(checkpoint.slots), unit="tensors") as task:
            write_resized(
                checkpoint,
                resize,
                context.folder,
                shard_bytes=self.shard_bytes(context.config),
                advance=lambda info: task.advance(1, note=info.name),
            )

    def _compare(self, checkpoint: Checkpoint, result: Checkpoint, context: StageContext) -> dict[str, Any]:
        from dynaconv.convert.compare import compare

        batches = self.batches(checkpoint, context)
        with context.progress.task(f"{self.name}: compare", total=1, unit="comparison") as task:
            found = compare(checkpoint, result, batches, trust_remote_code=context.config.trust_remote_code)
            task.advance(1, note=f"difference {found.relative:.2g}, loss {found.result_loss:.3f}")
        self.judge(found.relative, checkpoint.dtype.itemsize)
        return asdict(found)


class SubcloneStage(ResizeStage):
    """Dense checkpoint and its importance in, a smaller checkpoint out."""

    name = "subclone"
    consumes = ("dense", "importance")
    sections = ("seed", "data", "subclone")
    unfingerprinted = ("subclone.shard_bytes",)

    def problems(self, config: RunConfig) -> list[str]:
        """A target that is said twice or not at all, and a refit without what it needs."""
        wanted = config.subclone
        sizes = [name for name in SUBCLONE_SIZES if getattr(wanted, name) is not None]
        found = []
        if wanted.params is not None and (wanted.ratio is not None or sizes):
            others = ["ratio"] * (wanted.ratio is not None) + sizes
            found.append(f"subclone.params chooses the shape by itself: leave out {', '.join(others)}, or params")
        if wanted.params is None and wanted.ratio is None and not sizes:
            found.append(
                "subclone has no target: give params=1.3e9, ratio=0.5, or sizes such as residual=1024 ffn=2816 heads=8 "
                "layers=16"
            )
        if wanted.refit and not config.importance.second_moments:
            found.append("subclone.refit needs importance.second_moments=true")
        return found

    def decide(self, checkpoint: Checkpoint, config: RunConfig, importance: Path | None) -> Resize:
        """By importance, measured or taken to be even."""
        from dynaconv.convert.importance import Importance
        from dynaconv.convert.subclone import plan_subclone

        if importance is None:
            return plan_subclone(checkpoint, even_importance(checkpoint), replace(config.subclone, refit=False))
        return plan_subclone(checkpoint, Importance.open(importance, checkpoint), config.subclone)

    def estimate(self, config: RunConfig, source: Dense, parent: Dense | None = None) -> Estimate:
        """As its base; a shape that importance is to choose is guessed."""
        found = super().estimate(config, source, parent)
        if config.subclone.params is None:
            return found
        return replace(
            found, notes=(*found.notes, "a guess, all importance taken to be even: what is measured decides")
        )

    def method_peak_bytes(self, checkpoint: Checkpoint, result: Checkpoint, config: RunConfig) -> int:
        """That of the refit, where there is one."""
        return _refit_peak_bytes(checkpoint, result) if config.subclone.refit else 0

    def tell(self, context: StageContext, resize: Resize) -> None:
        """Warnings, and the shapes that a number of parameters left to choose from."""
        super().tell(context, resize)
        for place, each in enumerate(resize.summary.get("candidates", [])):
            shape = ", ".join(f"{name} {size}" for name, size in each["shape"].items())
            chosen = "chosen" if place == 0 else "instead"
            context.progress.say(
                f"{self.name}  {chosen}: {each['parameters']:,} parameters ({shape}): {each['reason']}"
            )

    def shard_bytes(self, config: RunConfig) -> int:
        """From the recipe."""
        return config.subclone.shard_bytes

    def batches(self, checkpoint: Checkpoint, context: StageContext) -> Sequence[Batch]:
        """Windows of the recipe's text."""
        from dynaconv.profile.calibration import calibration_batches

        window = context.config.data.sequence_length
        tokens = max(window, WINDOWS * LENGTH)
        return calibration_batches(checkpoint, context, tokens=tokens, batch_size=WINDOWS)[0]


class HypercloneStage(ResizeStage):
    """Dense checkpoint in, a larger one out that computes the same."""

    name = "hyperclone"
    consumes = ("dense",)
    sections = ("seed", "hyperclone")
    unfingerprinted = ("hyperclone.shard_bytes",)

    def decide(self, checkpoint: Checkpoint, config: RunConfig, importance: Path | None) -> Resize:
        """From the shape alone."""
        from dynaconv.convert.hyperclone import plan_hyperclone

        return plan_hyperclone(checkpoint, config.hyperclone, config.seed)

    def shard_bytes(self, config: RunConfig) -> int:
        """From the recipe."""
        return config.hyperclone.shard_bytes

    def batches(self, checkpoint: Checkpoint, context: StageContext) -> Sequence[Batch]:
        """Random tokens: no text is needed where everything must stay."""
        from dynaconv.convert.compare import random_batches

        length = min(LENGTH, checkpoint.max_positions or LENGTH)
        return random_batches(checkpoint.sizes["vocab"], windows=WINDOWS, length=length, seed=context.config.seed)

    def judge(self, relative: float, itemsize: int) -> None:
        """The logits must be the source's, to rounding."""
        limit = TOLERANCE.get(itemsize, max(TOLERANCE.values()))
        if relative > limit:
            raise QualityError(
                "the grown model does not compute what its source computes",
                expected=f"logits within {limit:g} of the largest",
                found=f"{relative:.3g}",
                hint="this is a fault of dynaconv: please report the family and the factors",
            )


def even_importance(checkpoint: Checkpoint) -> Importance:
    """What is taken for granted before anything was measured: all matters alike."""
    import torch

    from dynaconv.convert.importance import Importance

    sizes, layers = checkpoint.sizes, checkpoint.layers
    return Importance(
        residual=torch.ones(sizes["residual"]),
        neurons=torch.ones(layers, sizes["ffn"]),
        attention=torch.ones(layers, sizes["q_head"], sizes["v_dim"]),
        influence=torch.ones(layers),
    )


def in_words(seconds: float) -> str:
    """A time as rough as it is known."""
    if seconds < 1:
        return "a second"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _refit_peak_bytes(source: Checkpoint, result: Checkpoint) -> int:
    """The larger of fitting the down and the attention output projection of a layer."""
    from dynaconv.convert.refit import refit_peak_bytes

    old, new = source.sizes, result.sizes
    inputs = ((old["ffn"], new["ffn"]), (old["q_head"] * old["v_dim"], new["q_head"] * new["v_dim"]))
    return max(refit_peak_bytes(*each, old["residual"], source.dtype.itemsize) for each in inputs)


def _compare_peak_bytes(result: Checkpoint, tokens: int) -> int:
    """The largest projection, as stored and in float32, pieces of the heads, and the hidden states."""
    inside = (slot for slot in result.slots.values() if slot.layer is not None)
    projection = max(prod(slot.shape) for slot in inside)
    states = tokens * (12 * result.sizes["residual"] + 4 * result.sizes["ffn"])
    return projection * (WORD + result.dtype.itemsize) + WORD * states + 64 * 1024**2
