"""What fine-tuning will take: passes of a step, memory, FLOPs. Known from settings and headers, without torch's models.

D residual width, F FFN width, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.config import EngineConfig, FinetuneConfig, RunConfig
from dynaconv.pipeline.stage import Estimate

WORD = 4  # bytes of the float32 that weights, gradients and moments are kept in
# Values kept a token for the backward pass, measured: over D, F (each layer; all on, at a dial) and V; and how much of
# it where weights are frozen, which then do not need their inputs, and where adapters keep theirs.
RESIDUAL_KEPT, DENSE_KEPT, DIAL_KEPT, VOCABULARY_KEPT = 22.0, 5.25, 8.25, 9.5
OF_ALL = {"routers": 0.6, "lora": 1.3}


@dataclass(frozen=True)
class Passes:
    """Passes over a step's tokens, on average over a run. Dense training makes one forward and one backward pass.

    Attributes:
        forward: Forward passes of the model.
        backward: Backward passes of the model.
        parent: Forward passes of the frozen parent.
        again: Forward passes that activation checkpointing makes a second time.
    """

    forward: float
    backward: float
    parent: float
    again: float = 0.0

    @property
    def dense(self) -> float:
        """How many times the FLOPs of dense training that is; a backward pass costs two forward passes."""
        return (self.forward + 2 * self.backward + self.parent + self.again) / 3

    def __str__(self) -> str:
        said = f"{self.forward:g} forward and {self.backward:g} backward passes"
        said += f", {self.parent:g} forward of the parent" if self.parent else ""
        return said + (f", {self.again:g} forward again" if self.again else "")


def steps(config: RunConfig) -> int:
    """Optimiser steps of a run."""
    return max(1, math.floor(config.finetune.tokens / (config.finetune.batch_size * config.data.sequence_length)))


def needs_parent(tuning: FinetuneConfig) -> bool:
    """Whether the frozen dense checkpoint teaches."""
    return tuning.losses.distill_full.weight > 0 or (tuning.teacher == "parent" and tuning.losses.distill.weight > 0)


def passes(tuning: FinetuneConfig) -> Passes:
    """Passes of a step once every loss that has a weight is on."""
    losses, routed = tuning.losses, tuning.router != "uniform"
    full = losses.full.weight + losses.distill_full.weight > 0
    by_self = tuning.teacher == "self" and losses.distill.weight > 0
    share = _dial_share(tuning)  # of the steps that run the sampled dial
    backward = full * (tuning.trainable != "routers") + share
    return Passes(
        forward=max(float(full), share * (routed or by_self)) + share * (1 + (losses.consistency.weight > 0)),
        backward=backward,
        parent=float(needs_parent(tuning)),
        again=backward if tuning.gradient_checkpointing else 0.0,
    )


def _dial_share(tuning: FinetuneConfig) -> float:
    losses = tuning.losses
    labelled = tuning.router in ("curve", "class") and losses.router.weight > 0
    weight = losses.dial.weight + losses.distill.weight + losses.consistency.weight
    return (1 - tuning.full_share) * (weight > 0 or labelled)


def finetune_estimate(config: RunConfig, checkpoint: Checkpoint) -> Estimate:
    """Weights in fp32, gradients and AdamW's two moments of what is trained, activations of one micro-batch."""
    tuning, sizes, layers = config.finetune, checkpoint.sizes, checkpoint.layers
    tokens = tuning.batch_size * config.data.sequence_length // (tuning.accumulation * config.engine.nproc)
    weights, counted = WORD * checkpoint.parameters, passes(tuning)
    neurons = DIAL_KEPT if _dial_share(tuning) else DENSE_KEPT
    layer = OF_ALL.get(tuning.trainable, 1.0) * (RESIDUAL_KEPT * sizes["residual"] + neurons * sizes["ffn"])
    kept = sizes["residual"] * layers + 2 * layer if tuning.gradient_checkpointing else layers * layer
    activations = round(WORD * tokens * (kept + VOCABULARY_KEPT * sizes["vocab"]))
    batch = f"{tuning.batch_size} x {config.data.sequence_length} tokens"
    state = WORD * words_kept(config.engine, checkpoint.parameters, trained(tuning, checkpoint))
    return Estimate(
        peak_bytes=state + needs_parent(tuning) * weights + activations,
        disk_bytes=checkpoint.reader.total_bytes,
        flops=6.0 * counted.dense * checkpoint.parameters * tuning.tokens,
        notes=(f"{steps(config)} steps of {batch}", f"{counted} a step", *_shared(config.engine)),
    )


def words_kept(engine: EngineConfig, parameters: int, trained: int) -> int:
    """Numbers that one of the processes keeps of weights, gradients and AdamW's moments.

    What is offloaded stays on the machine, so it counts here too. DeepSpeed steps on copies of what is trained; its
    buffers, and what is there twice while it takes a model apart, are not counted.
    """
    ranks, stage = engine.nproc, engine.zero_stage if engine.kind == "deepspeed" else 0
    if stage == 0:
        return parameters + 3 * trained
    part = math.ceil(trained / ranks)
    if stage < 3:
        return parameters + 3 * part + (trained if stage == 1 else part)
    return max(parameters, math.ceil(parameters / ranks) + 4 * part)  # read whole, then taken apart


def _shared(engine: EngineConfig) -> tuple[str, ...]:
    shared = (f"memory is that of each of {engine.nproc} processes",) if engine.nproc > 1 else ()
    return (*shared, "DeepSpeed's buffers come on top of that memory") if engine.kind == "deepspeed" else shared


def trained(tuning: FinetuneConfig, checkpoint: Checkpoint) -> int:
    """Parameters that get gradients, without the routers, which are few."""
    if tuning.trainable == "routers":
        return 0
    if tuning.trainable == "ffn":
        return checkpoint.layers * checkpoint.ffn_parameters
    if tuning.trainable == "lora":
        linear = {name for name, slot in checkpoint.slots.items() if slot.spec.part in ("ffn", "attention")}
        shapes = [info.shape for name, info in checkpoint.reader.tensors.items() if name in linear]
        return tuning.lora_rank * sum(sum(shape) for shape in shapes if len(shape) == 2)
    return checkpoint.parameters
