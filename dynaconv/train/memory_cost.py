"""Where the memory of fine-tuning goes: what a process holds at the moments at which it may hold most.

Counted in words, the 4 bytes of a float32. Everything is counted where the process that holds most of it has it, and
what is offloaded stays on the machine, so it counts too. On a CPU this is resident memory, and PyTorch's AdamW goes
through the tensors one by one. Counts of tensors come from traces of every allocation; :data:`HEAP` and the libraries
(:data:`DEEPSPEED_BYTES`, :data:`PEFT_BYTES`) are measured.

D residual width, F FFN width, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from dynaconv.config import EngineConfig
from dynaconv.train.deepspeed_config import BUCKET, FLAT
from dynaconv.train.engine import CHUNK

WORD = 4  # bytes
DEEPSPEED_BYTES = 30 * 10**6  # resident size of what DeepSpeed imports beside the libraries of every stage; measured
PEFT_BYTES = 10 * 10**6  # the same of peft, which makes adapters

# Blocks up to this size stay in the allocator's heap when they are freed (glibc raises its mmap threshold up to it).
# The heap grows to so much of what is in use at once, because blocks of other sizes do not fit the gaps; measured.
HEAP_BLOCK, HEAP = 32 * 2**20, 1.75


@dataclass(frozen=True)
class Weights:
    """The model that is trained, in numbers.

    Attributes:
        all: Parameters.
        trained: Those that get gradients.
        largest: The largest tensor among these.
        head: Parameters of the output head where they are trained, otherwise 0.
        tied: Whether the head is the embedding: gradients of both are there at once, and added up.
    """

    all: int
    trained: int
    largest: int
    head: int
    tied: bool


@dataclass(frozen=True)
class Held:
    """Words of weights, gradients, moments and copies of them, without activations.

    Attributes:
        opening: When the engine takes the model over.
        always: Between two steps.
        backward: More than that at the end of the last backward pass.
        step: More than ``always`` while AdamW steps.
    """

    opening: int
    always: int
    backward: int
    step: int


def held(engine: EngineConfig, weights: Weights) -> Held:
    """What one of the processes holds beside activations.

    AdamW needs two further tensors as large as the one that it steps on: in DeepSpeed's stages 1 to 3 this is all that
    the rank steps on, in one.
    """
    if engine.kind == "deepspeed" and engine.zero_stage > 0:
        return (_zero_3 if engine.zero_stage == 3 else _zero_1_or_2)(engine, weights)
    sent = 0
    if engine.kind == "deepspeed":  # one flat copy of all gradients is sent, by one rank as well
        sent = min(FLAT, weights.trained)
    elif engine.nproc > 1:
        sent = 7 * min(CHUNK, weights.largest)  # a copy, and three in float64
    always = weights.all + 2 * weights.trained
    return Held(weights.all, always, weights.trained + sent, weights.trained + 2 * weights.largest)


def _zero_1_or_2(engine: EngineConfig, weights: Weights) -> Held:
    """Weights are views of a flat copy; a rank steps on a second copy of its part, then sends it to the others."""
    part = math.ceil(weights.trained / engine.nproc)
    always = weights.all + 3 * part
    gradients = 2 * part if engine.zero_stage == 2 else weights.trained  # of passes before, and of this one
    stepping = 4 * part  # gradients as they were added up and flat, and what AdamW needs
    if engine.offload_optimizer:
        # The flat gradient, what was added up before the last pass, a buffer for sending weights, two for gradients.
        always += 3 * part + 2 * weights.largest
        gradients -= part
        stepping = 2 * part
    return Held(weights.all + weights.trained + part, always, gradients + _sent(weights), stepping)


def _zero_3(engine: EngineConfig, weights: Weights) -> Held:
    """A rank has its part of each tensor, steps on a copy, and adds gradients up in a flat buffer.

    In a pass weights are put together; DeepSpeed keeps them for the backward pass, up to a billion.
    """
    part, own = math.ceil(weights.trained / engine.nproc), math.ceil(weights.all / engine.nproc)
    always = own + 4 * part + (part if engine.offload_optimizer else 0)
    gathered = min(weights.all, 10**9) if engine.nproc > 1 or engine.offload_parameters else 0
    stepping = 2 * part if engine.offload_optimizer else 3 * part
    return Held(weights.all + own + part, always, gathered + _sent(weights), stepping)


def _sent(weights: Weights) -> int:
    """Gradients of a bucket, and a flat copy that is sent; a tensor larger than the bucket is sent by itself."""
    bucket = min(BUCKET, weights.trained)
    return bucket + max(bucket, weights.largest)


@dataclass(frozen=True)
class Graph:
    """What a micro-batch keeps for its backward pass: blocks of one number a token and channel.

    Attributes:
        tokens: Of the micro-batch, on one rank.
        width: D.
        neurons: F.
        vocabulary: V.
        by_width: Blocks of D channels.
        by_neurons: Blocks of F channels.
        by_vocabulary: Blocks of V channels while the losses are computed, the last moment of the forward pass.
        has_gradients: Whether an earlier pass of the step has left gradients.
    """

    tokens: int
    width: int
    neurons: int
    vocabulary: int
    by_width: int
    by_neurons: int
    by_vocabulary: int
    has_gradients: bool = False

    def bytes_at(self, weights: Weights) -> int:
        """Bytes at the worst moment of the pass: the losses, the head's gradient, or the end, at the embedding."""
        layers = self._layers(_resident)
        gradients = (2 + self.has_gradients) * weights.head if weights.tied else weights.head
        return round(
            max(
                layers + self._logits(self.by_vocabulary, _resident),
                layers + self._logits(self.by_vocabulary - 2, _resident) + WORD * weights.head,
                self.bytes_left() + WORD * gradients,
            )
        )

    def bytes_left(self) -> int:
        """Bytes that the process keeps afterwards: the allocator's heap."""
        return round(self._layers(_left) + self._logits(self.by_vocabulary, _left))

    def _layers(self, size: Callable[[int], float]) -> float:
        wide = self.by_width * size(self.tokens * self.width)
        return wide + self.by_neurons * size(self.tokens * self.neurons)

    def _logits(self, count: int, size: Callable[[int], float]) -> float:
        return count * size(self.tokens * self.vocabulary)


def _resident(words: int) -> float:
    """Bytes that a block makes the process larger by."""
    return WORD * words * (HEAP if WORD * words <= HEAP_BLOCK else 1.0)


def _left(words: int) -> float:
    """Bytes of a block that are not given back when it is freed."""
    return _resident(words) if WORD * words <= HEAP_BLOCK else 0.0


def peak_bytes(engine: EngineConfig, weights: Weights, graph: Graph) -> int:
    """Bytes at the worst moment: the engine takes over, a backward pass, or a step."""
    words = held(engine, weights)
    return max(
        WORD * words.opening,
        WORD * (words.always + words.backward) + graph.bytes_at(weights),
        WORD * (words.always + words.step) + graph.bytes_left(),
    )
