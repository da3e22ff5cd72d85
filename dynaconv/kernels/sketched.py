"""Router and FFN in one: what kernels take that choose single neurons by a few-bit copy, and then compute them.

Kernels of :mod:`dynaconv.kernels.backend` are told what each token uses; these find out themselves, so that nothing is
read twice and no mask is written. What they must give is what ``SketchRouter`` and the reference give together, up to
rounding: for a token x and a neuron f, with codes read as far as each look reads them,

    first  = exp(reach) * |act(gate_coarse x)| * looked[f] * ||x||      (ungated: |act(up_coarse x)| * looked[f])
    second = |act(gate_bits x) * (up_bits x)| * norms[f]                (ungated: |act(up_bits x)| * norms[f])
    closer = first > level                                              the neuron is looked at twice
    on     = closer and second > level
    exact  = on and min(first, second) > exact_level

where every size is at least :data:`SMALLEST`. Where the activation is flat below 0 (``rounding`` is there), what it is
given in the first two lines, s, is replaced by (s + sqrt(s^2 + w^2)) / 2, with w = rounding[0] * ||x|| in the first and
rounding[1] * ||x|| in the second; computed as max(s, 0) + w^2 / (|s| + sqrt(s^2 + w^2)) / 2 nothing cancels.

All neurons give ``mean[f]`` times their column of down (``base``); one that is exact adds (act(gate x) (up x) -
mean[f]) times that column, one that is on but not exact the same in low-bit values, of down, too.

Ships with every exported model. M tokens, D residual width, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from dynaconv.kernels.codes import Codes
from dynaconv.kernels.weights import FFNWeights

SMALLEST = 1e-30
"""What neurons give that give less: a score is never minus infinity."""


@dataclass(frozen=True, eq=False)
class SketchedFFN:
    """An FFN with the few-bit copy of its weights.

    Attributes:
        weights: The network, exact.
        gate: Codes of gate, rows are neurons; ``None`` where there is none.
        up: Codes of up, rows are neurons.
        down: Codes of down, *transposed*: rows are neurons; ``None`` where there are no low-bit values.
        norms: Of the columns of down, (F,) float32.
        looked: What the first look is multiplied by, (F,) float32: ``norms``, times what |up x| / ||x|| is on average
            where there is a gate.
        reach: How far below the threshold, in nats, a neuron of the first look is looked at again.
        coarse: Planes that the first look reads, of gate alone (of up, without a gate).
        bits: Planes that the second look reads in all.
        activation: What ``config.json`` calls the nonlinearity.
        rounding: Of ``FewBitCopy``, (2,) float32; ``None`` where the activation is not flat below 0.
        packed: By backend, what it has made of all this.
    """

    weights: FFNWeights
    gate: Codes | None
    up: Codes
    down: Codes | None
    norms: Tensor
    looked: Tensor
    reach: float
    coarse: int
    bits: int
    activation: str
    rounding: Tensor | None = None
    packed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of a call.

    Attributes:
        level: Size from which a neuron is on, (M,) float32: exp(threshold + the layer's offset).
        exact_level: Size from which its values are exact, (M,) float32; ``None``: all that are on are exact.
        mean: What neurons give that are off, (F,) or (M, F); ``None``: nothing.
        base: ``mean @ down.T``, (D,) or (M, D); ``None`` where there is no mean.
    """

    level: Tensor
    exact_level: Tensor | None = None
    mean: Tensor | None = None
    base: Tensor | None = None


class Computed(NamedTuple):
    """What a kernel gives.

    Attributes:
        output: ``(M, D)``.
        counts: ``(M, 3)`` int32: neurons that were looked at twice, are on, are exact.
    """

    output: Tensor
    counts: Tensor


class SketchedBackend(NamedTuple):
    """A way to run it.

    Attributes:
        name: For messages.
        can_run: Whether it serves these arguments, and why or why not in a few words. It looks at types, devices and
            shapes only, never at values: on a GPU that would wait for the device.
        run: Does it, for tokens (M, D).
    """

    name: str
    can_run: Callable[[SketchedFFN, Tensor], tuple[bool, str]]
    run: Callable[[SketchedFFN, Tensor, Asked], Computed]
