"""Backend for nested blocks on a CPU: reads only the weights it needs. Ships with every exported model.

For inference. Weights are used where they lie; which of three kernels runs follows from the widths of the batch:

* ``prefix_ffn``: all tokens use the same width, so one slice of each matrix is all there is.
* ``capped_ffn``: tokens differ, but there is too little to save: all use the largest width, then what a token did not
  ask for is put to zero.
* ``staircase_ffn``: tokens differ. Sorted by width, descending, every block is used by a contiguous prefix of the rows,
  so each weight is read once, by exactly the tokens that want it. Adjacent blocks used by the same rows are one step,
  and so are blocks whose rows differ by less than another step would cost: what is computed in vain is put to zero.

Measured with ``python scripts/bench_cpu.py`` (one thread of an AMD EPYC with AVX-512, D 2048, F 8192, 8 blocks, times
as fast as the dense FFN, fp32 / bf16):

* one token: 3.5 / 3.7 at share .25, 1.9 / 2.0 at .5, 1.3 / 1.3 at .75;
* random widths, mean share .5: 1.26 / 1.03 for 8 tokens, 1.9 / 1.4 for 64, 2.0 / 1.7 for 256.

Where it does not pay: few tokens of which one is full read every weight (8 tokens in bf16: 0.96 of dense), and where
the dense FFN takes a fraction of a millisecond, masking shows (D 256, F 1024, 16 tokens: about 0.8).

Shapes: M tokens, D residual width, F neurons, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from dynaconv.kernels.backend import Backend, cpu_inference
from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Choice, Prefix
from dynaconv.kernels.weights import FFNWeights

STEP_COST = {torch.bfloat16: 8 << 20, torch.float16: 8 << 20}
STEP_COST_OTHER = 1 << 20
"""What one more matrix product costs beside its arithmetic, in multiply-adds: some 30 us of one core, in which half
precision does more of them. Found by trying 0 to 128 million at D x F of 256 x 1024, 1024 x 3072 and 2048 x 8192 with
2 to 256 tokens. Within a factor of 2 the choice hardly matters; 0 loses 10 % at D 2048 and half at D 256 in bf16."""

CLEARED_ROWS = 16
"""Up to this many rows, clearing them one by one costs no more than sorting them, moving them and moving them back."""

SORTING_STEPS = 4
"""What sorting a small batch and putting it back costs, in further matrix products."""


def can_run(ffn: BlockedFFN, x: torch.Tensor, choice: Choice) -> tuple[bool, str]:
    """Prefixes on a CPU, where no gradient is recorded."""
    if not isinstance(choice, Prefix):
        return False, "tokens do not choose prefixes of blocks"
    return cpu_inference(ffn, x) or (True, "tokens use the first blocks, on a CPU")


def run(ffn: BlockedFFN, x: torch.Tensor, choice: Choice) -> torch.Tensor:
    """The FFN ``(M, D)`` of tokens ``x`` (M, D) that use a :class:`Prefix` (M,) each.

    At one token this runs for every layer, with caches that 100 MB of weights have just gone through: ``len`` or
    ``.device.type`` of a tensor would cost 20 us each.
    """
    assert isinstance(choice, Prefix)
    kernel, width = kernel_for(ffn, x, choice.widths)
    if kernel == "prefix":
        return prefix_ffn(ffn, x, width)
    return staircase_ffn(ffn, x, choice.widths) if kernel == "staircase" else capped_ffn(ffn, x, choice.widths)


def kernel_for(ffn: BlockedFFN, x: torch.Tensor, widths: torch.Tensor) -> tuple[str, int]:
    """``prefix`` (one width, or no tokens), ``capped`` or ``staircase``, and the largest width of the batch."""
    values = widths.tolist()
    low, high = (min(values), max(values)) if values else (0, 0)
    if low == high:
        return "prefix", high
    if len(values) <= CLEARED_ROWS:
        edges = ffn.partition.edges
        unused = sum(edges[high] - edges[value] for value in values)
        if unused * x.shape[1] <= SORTING_STEPS * step_cost(x.dtype):
            return "capped", high
    return "staircase", high


class Step(NamedTuple):
    """The first ``rows`` of the sorted tokens use neurons [start, stop)."""

    rows: int
    start: int
    stop: int


def prefix_ffn(ffn: BlockedFFN, x: torch.Tensor, width: int) -> torch.Tensor:
    """The FFN of every token with its first ``width`` blocks.

    Args:
        ffn: The network.
        x: ``(M, D)``.
        width: Blocks used, 0 to N.

    Returns:
        ``(M, D)``, always a new tensor.
    """
    if width == 0:
        return ffn.no_blocks(x)
    stop = ffn.partition.edges[width]
    return linear(ffn.neurons(x, 0, stop), ffn.columns(0, stop), ffn.weights.down_bias)


@torch.no_grad()
def capped_ffn(ffn: BlockedFFN, x: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """The FFN of each token with the first ``widths[m]`` blocks, computed to the largest of them for all tokens.

    Arguments and result as :func:`staircase_ffn`, which does less arithmetic in more steps.
    """
    edges = ffn.partition.edges
    stops = [edges[width] for width in widths.tolist()]
    largest = max(stops, default=0)
    if largest == 0:
        return ffn.no_blocks(x)
    hidden = ffn.neurons(x, 0, largest)
    for row, stop in enumerate(stops):
        if stop < largest:
            hidden[row, stop:].zero_()
    return linear(hidden, ffn.columns(0, largest), ffn.weights.down_bias)


@torch.no_grad()
def staircase_ffn(ffn: BlockedFFN, x: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """The FFN of each token with the first ``widths[m]`` blocks, every weight read at most once. Records no gradients.

    Args:
        ffn: The network.
        x: ``(M, D)``.
        widths: ``(M,)`` int64, 0 to N.

    Returns:
        ``(M, D)``, always a new tensor.
    """
    steps = stairs(sorted(widths.tolist(), reverse=True), ffn.partition.edges)
    if not steps:
        return ffn.no_blocks(x)
    shapes = steps
    if x.dtype in STEP_COST:
        shapes = [step._replace(rows=few_counts(step.rows, len(x))) for step in steps]
    slack = step_cost(x.dtype) // x.shape[1]  # in row-neurons of one matrix product
    inner, outer = merge(shapes, slack if ffn.weights.gate is None else slack // 2), merge(shapes, slack)
    if len(inner) == 1 and len(x) <= CLEARED_ROWS:
        return capped_ffn(ffn, x, widths)
    order = widths.argsort(descending=True)
    rows = x.index_select(0, order)
    hidden = x.new_empty(
        len(x), ffn.partition.neurons
    )  # not only to the last step: the row stride is part of a product's shape
    for count, start, stop in inner:
        ffn.neurons(rows[:count], start, stop, out=hidden[:count, start:stop])
    _clear(hidden, steps, outer)
    total = _down(hidden, outer, ffn.weights)
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
    """Joins adjacent steps as long as that wastes at most ``slack`` neuron evaluations, outside every token's choice.

    Args:
        steps: As :func:`stairs` gives them.
        slack: Largest number of them in one joined step.

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


def _variant(ffn: BlockedFFN, x: torch.Tensor, choice: Choice) -> str:
    assert isinstance(choice, Prefix)
    return kernel_for(ffn, x, choice.widths)[0]


CPU_NESTED = Backend("cpu-nested", can_run, run, _variant)
