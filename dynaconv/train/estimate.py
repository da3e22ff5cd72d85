"""What fine-tuning will take: passes of a step, memory, FLOPs. Known from settings and headers, without any model.

D residual width, F FFN width, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.config import EngineConfig, FinetuneConfig, RunConfig
from dynaconv.pipeline.stage import Estimate
from dynaconv.train.memory_cost import DEEPSPEED_BYTES, PEFT_BYTES, WORD, Graph, Weights, peak_bytes
from dynaconv.train.objectives.base import Objective
from dynaconv.train.objectives.registry import needs_parent, passes_of, trains, weighted
from dynaconv.train.router_kinds import router_objective
from dynaconv.train.sampler import steps_of

# Blocks of D and of F channels that each layer keeps for the backward pass, by what is trained. Weights that are frozen
# do not need their inputs. Adapters need theirs (7 and 4), and the small blocks that they keep lie in the gaps that the
# sums with their outputs leave, so that these cannot be used again.
KEPT = {"all": (10, 4), "ffn": (5, 4), "routers": (6, 3), "lora": (10, 6)}


@dataclass(frozen=True)
class PassCount:
    """Passes over a step's tokens, on average over a run. Dense training makes one forward and one backward pass.

    Attributes:
        forward: Forward passes of the model.
        backward: Backward passes of the model.
        parent: Forward passes of the frozen parent.
        recomputed: Forward passes that activation checkpointing makes a second time.
    """

    forward: float = 0.0
    backward: float = 0.0
    parent: float = 0.0
    recomputed: float = 0.0

    @property
    def dense(self) -> float:
        """How many times the FLOPs of dense training that is; a backward pass costs two forward passes."""
        return (self.forward + 2 * self.backward + self.parent + self.recomputed) / 3

    def __str__(self) -> str:
        said = f"{self.forward:g} forward and {self.backward:g} backward passes"
        said += f", {self.parent:g} forward of the parent" if self.parent else ""
        return said + (f", {self.recomputed:g} forward again" if self.recomputed else "")


def pass_count(tuning: FinetuneConfig) -> PassCount:
    """Passes of a step once every loss that has a weight is on and routers decide: what its objectives need."""
    found = PassCount()
    for share, active in _steps_by_kind(tuning):
        passes = passes_of(active, by_router=_by_router(tuning))
        # the gradient of a router's own labels ends at the router
        backward = {one.student for one in active if trains(one, tuning) and "labels" not in one.needs}
        found = PassCount(
            forward=found.forward + share * len(passes & {"full", "second", "dial"}),
            backward=found.backward + share * len(backward),
            parent=found.parent + share * ("parent" in passes),
        )
    return replace(found, recomputed=found.backward if tuning.gradient_checkpointing else 0.0)


def _steps_by_kind(tuning: FinetuneConfig) -> list[tuple[float, list[Objective]]]:
    """Shares of the steps, and what each minimises: those at a sampled dial, and those at the full dial only."""
    active = list(weighted(tuning).values())
    at_full = [objective for objective in active if objective.student == "full"]
    return [(1 - tuning.full_share, active), (tuning.full_share, at_full)]


def _by_router(tuning: FinetuneConfig) -> bool:
    return router_objective(tuning) != "none"


def finetune_estimate(config: RunConfig, checkpoint: Checkpoint, parent: Checkpoint) -> Estimate:
    """Weights in fp32, gradients, AdamW's two moments, what the engine copies, and activations of one micro-batch.

    Args:
        config: The resolved recipe.
        checkpoint: What is trained.
        parent: The frozen model that may teach; it is held in the dtype that it is stored in.
    """
    tuning, counted = config.finetune, pass_count(config.finetune)
    teaching = PassCount(parent=counted.parent)
    training = replace(counted, parent=0.0)
    flops = 6.0 * (training.dense * checkpoint.parameters + teaching.dense * parent.parameters) * tuning.tokens
    batch = f"{tuning.batch_size} x {config.data.sequence_length} tokens"
    memory = peak_bytes(config.engine, weights_of(tuning, checkpoint), graph_of(config, checkpoint))
    return Estimate(
        peak_bytes=memory
        + copies_bytes(config, checkpoint)
        + needs_parent(tuning) * parent.reader.total_bytes
        + _imported(config),
        disk_bytes=checkpoint.reader.total_bytes,
        flops=flops,
        notes=(f"{steps_of(config)} steps of {batch}", f"{counted} a step", *_shared(config.engine)),
    )


def weights_of(tuning: FinetuneConfig, checkpoint: Checkpoint) -> Weights:
    """The model in numbers, without the routers, which are few."""
    sizes = [math.prod(slot.shape) for slot in checkpoint.slots.values()]
    within = [math.prod(slot.shape) for slot in checkpoint.slots.values() if slot.spec.part == "ffn"]
    largest = {"all": max(sizes), "ffn": max(within)}.get(tuning.trainable, 0)
    head = checkpoint.head_parameters if tuning.trainable == "all" else 0
    return Weights(checkpoint.parameters, trained(tuning, checkpoint), largest, head, checkpoint.tied)


def copies_bytes(config: RunConfig, checkpoint: Checkpoint) -> int:
    """Few-bit copies of the FFNs in fp32: both sketches, low-bit values, and these once more in a graph."""
    if config.experts != "neurons":
        return 0
    copies = 1 + 2 * (config.sketch.values == "mixed")
    return WORD * copies * checkpoint.layers * checkpoint.ffn_parameters


def graph_of(config: RunConfig, checkpoint: Checkpoint) -> Graph:
    """What the largest backward pass of a step keeps: the one at the sampled dial, where there is one."""
    tuning, sizes = config.finetune, checkpoint.sizes
    passes = passes_of(weighted(tuning).values(), by_router=_by_router(tuning))
    dial, teachers = "dial" in passes and tuning.full_share < 1, needs_parent(tuning)
    by_width, by_neurons = KEPT[tuning.trainable]
    by_neurons += dial  # activations before and after they are masked
    if dial and config.experts == "neurons" and config.sketch.values == "mixed":
        by_width, by_neurons = by_width + 1, 2 * KEPT[tuning.trainable][1]  # once more with low-bit values
    # Log-probabilities, and what the loss makes of them; of a divergence, its teacher's and exp of these.
    by_vocabulary = 5 + teachers + 2 * ("second" in passes) if dial else 3 + 2 * teachers
    layers = checkpoint.layers
    if tuning.gradient_checkpointing:  # what goes into each layer; one layer recomputed, and its gradients
        by_width, by_neurons = layers + 2 * by_width, 2 * by_neurons
    else:
        by_width, by_neurons = layers * by_width, layers * by_neurons
    tokens = tuning.batch_size * config.data.sequence_length // (tuning.accumulation * config.engine.nproc)
    has_gradients = tuning.accumulation > 1 or pass_count(tuning).backward > 1
    return Graph(
        tokens, sizes["residual"], sizes["ffn"], sizes["vocab"], by_width, by_neurons, by_vocabulary, has_gradients
    )


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
