"""Inference on a CPU that reads only the weights it needs. Ships with every exported model.

The kernels use weights where they lie: a prefix of blocks is a slice of the rows of gate and up and of the columns of
down. They are for inference; ``reference`` is for training.

* ``prefix_ffn``: all tokens use the same width, so one slice of each matrix is all there is.
* ``capped_ffn``: tokens differ, but there is too little to save: all use the largest width, then what a token did not
  ask for is put to zero.
* ``staircase_ffn``: tokens differ. Sorted by width, descending, every block is used by a contiguous prefix of the rows,
  so each weight is read once, by exactly the tokens that want it. Adjacent blocks used by the same rows are one step,
  and so are blocks whose rows differ by less than another step would cost: what is computed in vain is put to zero.

Shapes: M tokens, D residual width, F neurons, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from dynaconv.kernels.weights import FFNWeights

STEP_COST = {torch.bfloat16: 8 << 20, torch.float16: 8 << 20}
STEP_COST_OTHER = 1 << 20
"""What one more matrix product costs beside its arithmetic, in multiply-adds: some 30 us of one core, in which half
precision does more of them. Found by trying 0 to 128 million at D x F of 256 x 1024, 1024 x 3072 and 2048 x 8192 with
2 to 256 tokens. Within a factor of 2 the choice hardly matters; 0 loses 10 % at D 2048 and half at D 256 in bf16."""

CLEARED_ROWS = 16
"""Up to this many rows, clearing them one by one costs no more than sorting them, moving them and moving them back."""


class Step(NamedTuple):
    """The first ``rows`` of the sorted tokens use neurons [start, stop)."""

    rows: int
    start: int
    stop: int


def prefix_ffn(x: torch.Tensor, width: int, weights: FFNWeights, edges: Sequence[int]) -> torch.Tensor:
    """The FFN of every token with its first ``width`` blocks.

    Args:
        x: ``(M, D)``.
        width: Blocks used, 0 to N.
        weights: The network.
        edges: N + 1 neuron positions.

    Returns:
        ``(M, D)``, always a new tensor.
    """
    if width == 0:
        return no_blocks(x, weights)
    stop = edges[width]
    return linear(neurons(x, weights, 0, stop), weights.down.narrow(1, 0, stop), weights.down_bias)


@torch.no_grad()
def capped_ffn(x: torch.Tensor, widths: torch.Tensor, weights: FFNWeights, edges: Sequence[int]) -> torch.Tensor:
    """The FFN of each token with the first ``widths[m]`` blocks, computed to the largest of them for all tokens.

    Arguments and result as :func:`staircase_ffn`, which does less arithmetic in more steps.
    """
    stops = [edges[width] for width in widths.tolist()]
    largest = max(stops, default=0)
    if largest == 0:
        return no_blocks(x, weights)
    hidden = neurons(x, weights, 0, largest)
    for row, stop in enumerate(stops):
        if stop < largest:
            hidden[row, stop:].zero_()
    return linear(hidden, weights.down.narrow(1, 0, largest), weights.down_bias)


@torch.no_grad()
def staircase_ffn(x: torch.Tensor, widths: torch.Tensor, weights: FFNWeights, edges: Sequence[int]) -> torch.Tensor:
    """The FFN of each token with the first ``widths[m]`` blocks, every weight read at most once. Records no gradients.

    Args:
        x: ``(M, D)``.
        widths: ``(M,)`` int64, 0 to N.
        weights: The network.
        edges: N + 1 neuron positions.

    Returns:
        ``(M, D)``, always a new tensor.
    """
    steps = stairs(sorted(widths.tolist(), reverse=True), edges)
    if not steps:
        return no_blocks(x, weights)
    shapes = steps
    if x.dtype in STEP_COST:
        shapes = [step._replace(rows=few_counts(step.rows, len(x))) for step in steps]
    slack = step_cost(x.dtype) // x.shape[1]  # in row-neurons of one matrix product
    inner, outer = merge(shapes, slack if weights.gate is None else slack // 2), merge(shapes, slack)
    if len(inner) == 1 and len(x) <= CLEARED_ROWS:
        return capped_ffn(x, widths, weights, edges)
    order = widths.argsort(descending=True)
    rows = x.index_select(0, order)
    hidden = x.new_empty(len(x), edges[-1])  # not only to the last step: the row stride is part of a product's shape
    for count, start, stop in inner:
        neurons(rows[:count], weights, start, stop, out=hidden[:count, start:stop])
    _clear(hidden, steps, outer)
    total = _down(hidden, outer, weights)
    return torch.empty_like(total).index_copy_(0, order, total)


def step_cost(dtype: torch.dtype) -> int:
    """What one more matrix product costs beside its arithmetic, in multiply-adds of ``dtype``."""
    return STEP_COST.get(dtype, STEP_COST_OTHER)


def stairs(widths: Sequence[int], edges: Sequence[int]) -> list[Step]:
    """The steps of a staircase, neurons ascending, rows falling.

    Args:
        widths: Descending, one a row.
        edges: N + 1 neuron positions.

    Returns:
        Steps that together cover neurons [0, edges[widths[0]]) once; none where every width is 0.
    """
    steps: list[Step] = []
    done = 0
    for count in range(len(widths), 0, -1):
        width = widths[count - 1]
        if width > done:
            steps.append(Step(count, edges[done], edges[width]))
            done = width
    return steps


def merge(steps: Sequence[Step], slack: int) -> list[Step]:
    """Joins adjacent steps as long as that adds at most ``slack`` row-neurons that nobody asked for.

    Args:
        steps: As :func:`stairs` gives them.
        slack: Largest sum over a joined step of rows too many times neurons.

    Returns:
        Fewer steps over the same neurons, each with the rows of its first.
    """
    joined: list[Step] = []
    waste = 0
    for step in steps:
        if joined:
            last = joined[-1]
            waste += (last.rows - step.rows) * (step.stop - step.start)
            if waste <= slack:
                joined[-1] = last._replace(stop=step.stop)
                continue
        joined.append(step)
        waste = 0
    return joined


def few_counts(count: int, rows: int) -> int:
    """``count`` rounded up to 8, 12, 16 ... 64, then to 8 sizes an octave, at most ``rows``.

    In half precision oneDNN compiles a kernel for every new shape, which takes about a millisecond: as long as the
    product of 1024 neurons and 80 rows. Left alone, a staircase would go on bringing new counts. Below 8 rows the time
    goes into reading the weights, so that more rows are almost free: a batch of 8 becomes one step.
    """
    grain = 8 if count <= 8 else max(4, 1 << count.bit_length() >> 4)
    return min(rows, -(-count // grain) * grain)


def _clear(hidden: torch.Tensor, steps: Sequence[Step], plan: Sequence[Step]) -> None:
    """Puts to zero what the products of ``plan`` read and ``steps`` do not use."""
    remaining = iter(steps)
    for rows, _, end in plan:
        for count, start, stop in remaining:
            if count < rows:
                hidden[count:rows, start:stop].zero_()
            if stop == end:
                break


def _down(hidden: torch.Tensor, steps: Sequence[Step], weights: FFNWeights) -> torch.Tensor:
    """The down projection of ``hidden`` ``(M, F')``, whose unused neurons are zero, step by step: ``(M, D)``."""
    rows, _, stop = steps[0]
    total = hidden.new_empty(len(hidden), len(weights.down))
    if weights.down_bias is None:
        torch.mm(hidden[:rows, :stop], weights.down[:, :stop].t(), out=total[:rows])
        total[rows:].zero_()
    else:
        total.copy_(weights.down_bias)
        total[:rows].addmm_(hidden[:rows, :stop], weights.down[:, :stop].t())
    for rows, start, stop in steps[1:]:
        total[:rows].addmm_(hidden[:rows, start:stop], weights.down[:, start:stop].t())
    return total


def neurons(
    x: torch.Tensor, weights: FFNWeights, start: int, stop: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Neurons [start, stop) of the network, into ``out`` where given: ``(M, D)`` to ``(M, stop - start)``."""
    count = stop - start
    bias = None if weights.up_bias is None else weights.up_bias.narrow(0, start, count)
    up = linear(x, weights.up.narrow(0, start, count), bias)
    if weights.gate is None:
        active = weights.activation(up)
        return active if out is None else out.copy_(active)
    bias = None if weights.gate_bias is None else weights.gate_bias.narrow(0, start, count)
    return torch.mul(weights.activation(linear(x, weights.gate.narrow(0, start, count), bias)), up, out=out)


def no_blocks(x: torch.Tensor, weights: FFNWeights) -> torch.Tensor:
    """What the network gives with every neuron off: its down bias in each row, or zeros."""
    if weights.down_bias is None:
        return torch.zeros_like(x)
    return weights.down_bias.to(x.dtype).repeat(len(x), 1)
