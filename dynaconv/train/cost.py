"""What fine-tuning will take: passes of a step, memory, FLOPs. Known from settings and headers, without torch's models.

D residual width, F FFN width, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.config import EngineConfig, FinetuneConfig, RunConfig
from dynaconv.pipeline.stage import Estimate
from dynaconv.train.memory_cost import DEEPSPEED_BYTES, PEFT_BYTES, Graph, Weights, peak_bytes

# Blocks of D and of F channels that each layer keeps for the backward pass, by what is trained. Weights that are frozen
# do not need their inputs. Adapters need theirs (7 and 4), and the small blocks that they keep lie in the gaps that the
# sums with their outputs leave, so that these cannot be used again.
KEPT = {"all": (10, 4), "ffn": (5, 4), "routers": (6, 3), "lora": (10, 6)}


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


def finetune_estimate(config: RunConfig, checkpoint: Checkpoint, parent: Checkpoint) -> Estimate:
    """Weights in fp32, gradients, AdamW's two moments, what the engine copies, and activations of one micro-batch.

    Args:
        config: The resolved recipe.
        checkpoint: What is trained.
        parent: The frozen model that may teach; it is held in the dtype that it is stored in.
    """
    tuning, counted = config.finetune, passes(config.finetune)
    teaching = replace(counted, forward=0.0, backward=0.0, again=0.0)
    training = replace(counted, parent=0.0)
    flops = 6.0 * (training.dense * checkpoint.parameters + teaching.dense * parent.parameters) * tuning.tokens
    batch = f"{tuning.batch_size} x {config.data.sequence_length} tokens"
    memory = peak_bytes(config.engine, weights_of(tuning, checkpoint), graph_of(config, checkpoint))
    return Estimate(
        peak_bytes=memory + needs_parent(tuning) * parent.reader.total_bytes + _imported(config),
        disk_bytes=checkpoint.reader.total_bytes,
        flops=flops,
        notes=(f"{steps(config)} steps of {batch}", f"{counted} a step", *_shared(config.engine)),
    )


def weights_of(tuning: FinetuneConfig, checkpoint: Checkpoint) -> Weights:
    """The model in numbers, without the routers, which are few."""
    sizes = [math.prod(slot.shape) for slot in checkpoint.slots.values()]
    within = [math.prod(slot.shape) for slot in checkpoint.slots.values() if slot.spec.part == "ffn"]
    largest = {"all": max(sizes), "ffn": max(within)}.get(tuning.trainable, 0)
    head = checkpoint.head_parameters if tuning.trainable == "all" else 0
    return Weights(checkpoint.parameters, trained(tuning, checkpoint), largest, head, checkpoint.tied)


def graph_of(config: RunConfig, checkpoint: Checkpoint) -> Graph:
    """What the largest backward pass of a step keeps: the one at the sampled dial, where there is one."""
    tuning, sizes, dial = config.finetune, checkpoint.sizes, _dial_share(config.finetune) > 0
    by_width, by_neurons = KEPT[tuning.trainable]
    by_neurons += dial  # activations before and after they are masked
    # Log-probabilities, and what the loss makes of them; of a divergence, its teacher's and exp of these.
    by_vocabulary = (5 + needs_parent(tuning)) if dial else (3 + 2 * needs_parent(tuning))
    by_vocabulary += 2 * (dial and tuning.losses.consistency.weight > 0)
    layers = checkpoint.layers
    if tuning.gradient_checkpointing:  # what goes into each layer; one layer recomputed, and its gradients
        by_width, by_neurons = layers + 2 * by_width, 2 * by_neurons
    else:
        by_width, by_neurons = layers * by_width, layers * by_neurons
    tokens = tuning.batch_size * config.data.sequence_length // (tuning.accumulation * config.engine.nproc)
    again = tuning.accumulation > 1 or passes(tuning).backward > 1
    return Graph(tokens, sizes["residual"], sizes["ffn"], sizes["vocab"], by_width, by_neurons, by_vocabulary, again)


def _imported(config: RunConfig) -> int:
    adapters = PEFT_BYTES if config.finetune.trainable == "lora" else 0
    return adapters + (DEEPSPEED_BYTES if config.engine.kind == "deepspeed" else 0)


def _shared(engine: EngineConfig) -> tuple[str, ...]:
    shared = (f"memory is that of each of {engine.nproc} processes",) if engine.nproc > 1 else ()
    return (*shared, "what engine.deepspeed_config sets is not counted") if engine.deepspeed_config else shared


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
