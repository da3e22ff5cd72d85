"""Backend for routed blocks on a CPU: each token has blocks of its own choice. Ships with every exported model.

For inference. Weights are used where they lie: the first two read no block that no token uses, but for columns of down
in small gaps, and differ in what they compute of the others.

* ``union_ffn``: every token gets every block that some token uses, then what a token did not choose is put to zero. For
  one token that is exactly its own blocks; for a few, wasted arithmetic is cheaper than further steps.
* ``grouped_ffn``: block by block, on the tokens that use it, gathered; results are added up where they belong.
* ``masked_ffn``: every neuron is computed, then what a token did not choose is put to zero. For blocks so small and
  scattered that their matrix products would cost more than what is left out.

Shapes: M tokens, D residual width, F neurons, N blocks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import linear

from dynaconv.kernels.backend import Backend, cpu_inference
from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Choice, Subset
from dynaconv.kernels.cpu_nested import STEP_COST, few_counts, step_cost
from dynaconv.kernels.partition import Partition

GAP = 384
"""Columns of down that are read in the time that beginning another piece takes: its rows lie on pages of their own.
Found at D 2048, F 8192, one token, fp32: with pieces of 128 to 512 columns, beginning one costs 320 to 500."""

RUN_BYTES = {torch.bfloat16: 288 << 10, torch.float16: 288 << 10}
RUN_BYTES_OTHER = 112 << 10
"""What one more run of blocks costs a single token, in bytes of one matrix that are read in that time: the calls, and
short pieces being read more slowly. Found by timing ``union_ffn`` beside the reference (one thread of an AMD EPYC with
AVX-512, random blocks of 16 and 128 neurons, shares .25, .5 and .75, D x F of 256 x 1024, 1024 x 4096 and 2048 x 8192).
Blocks of 16 cost 55 to 170 KiB in fp32 and 80 to 290 KiB in bf16, more where D is larger; a run of larger blocks costs
more, but there are too few for that to decide. Of 36 cases these values chose the slower kernel in one, by 4 %; 256 KiB
for both, in four, by up to 23 %."""


def can_run(ffn: BlockedFFN, x: Tensor, choice: Choice) -> tuple[bool, str]:
    """Subsets of blocks on a CPU, where no gradient is recorded."""
    if not isinstance(choice, Subset):
        return False, "tokens do not choose blocks one by one"
    return cpu_inference(ffn, x) or (True, "tokens use blocks of their own, on a CPU")


def run(ffn: BlockedFFN, x: Tensor, choice: Choice) -> Tensor:
    """The FFN ``(M, D)`` of tokens ``x`` (M, D) that use a :class:`Subset` (M, N) each."""
    assert isinstance(choice, Subset)
    kernel, used = kernel_for(ffn, x, choice.on)
    if kernel == "union":
        return union_ffn(ffn, x, choice.on, used)
    return (grouped_ffn if kernel == "grouped" else masked_ffn)(ffn, x, choice.on)


def kernel_for(ffn: BlockedFFN, x: Tensor, on: Tensor) -> tuple[str, list[tuple[int, int]]]:
    """Which kernel costs least, ``union``, ``grouped`` or ``masked``; and the runs of blocks that any token uses.

    One token waits for weights to be read, so neurons are counted, and each run of blocks as :data:`RUN_BYTES` more.
    Several tokens pay for arithmetic, and :func:`step_cost` for each matrix product.
    """
    tokens, width = x.shape
    partition, neurons = ffn.partition, ffn.partition.neurons
    if tokens == 1:
        edges, joined = partition.edges, runs(on.tolist()[0])
        read = sum(edges[end] - edges[first] for first, end in joined)
        further = max(0, len(joined) - 1)
        cost = RUN_BYTES.get(x.dtype, RUN_BYTES_OTHER) / (width * x.itemsize)
        return ("union" if read + further * cost <= neurons else "masked"), joined
    counts = on.sum(0)
    used = counts > 0
    sizes = torch.tensor(partition.sizes) if partition.uniform_size is None else partition.uniform_size
    read, joined = int((used * sizes).sum()), runs(used.tolist())
    cost = step_cost(x.dtype) / width
    wasted = int(((tokens - counts) * used * sizes).sum())
    if wasted > int(used.sum()) * cost:
        return "grouped", joined
    return ("union" if read * tokens + len(joined) * cost < neurons * tokens + cost else "masked"), joined


@torch.no_grad()
def union_ffn(ffn: BlockedFFN, x: Tensor, on: Tensor, used: Sequence[tuple[int, int]] | None = None) -> Tensor:
    """The FFN of each token restricted to its own blocks, computed on all that any of them uses.

    Args:
        ffn: The network.
        x: ``(M, D)``.
        on: ``(M, N)`` bool.
        used: The runs of blocks that any token uses, where they are known.

    Returns:
        ``(M, D)``.
    """
    edges = ffn.partition.edges
    if used is None:
        used = runs(on.any(0).tolist())
    off = None if x.shape[0] == 1 else Off.of(ffn.partition, on)
    total: Tensor | None = None
    for piece in pieces([(edges[first], edges[end]) for first, end in used]):
        start, stop = piece[0][0], piece[-1][1]
        hidden = x.new_zeros(len(x), stop - start) if len(piece) > 1 else x.new_empty(len(x), stop - start)
        for a, b in piece:
            ffn.neurons(x, a, b, out=hidden[:, a - start : b - start])
        if off is not None:
            off.clear(hidden, start)
        down = ffn.columns(start, stop)
        if total is None:
            total = linear(hidden, down, ffn.weights.down_bias)
        elif total.dtype == x.dtype:
            total.addmm_(hidden, down.t())
        else:  # under autocast, which leaves products in place alone
            total.addmm_(hidden.to(total.dtype), down.t().to(total.dtype))
    return ffn.no_blocks(x) if total is None else total


@torch.no_grad()
def grouped_ffn(ffn: BlockedFFN, x: Tensor, on: Tensor) -> Tensor:
    """The FFN of each token restricted to its own blocks, each block computed for the tokens that use it.

    Arguments and result as :func:`union_ffn`, which does more arithmetic in fewer steps. Added up in fp32 at least.
    """
    edges, total = ffn.partition.edges, ffn.no_blocks(x)
    total = total.to(torch.promote_types(x.dtype, torch.float32))
    for block, count in enumerate(on.sum(0).tolist()):
        start, stop = edges[block], edges[block + 1]
        if count == len(x):
            total += linear(ffn.neurons(x, start, stop), ffn.columns(start, stop))
        elif count:
            rows = on[:, block].nonzero()[:, 0]
            taken = rows
            if x.dtype in STEP_COST:  # padding rows, so that oneDNN meets fewer shapes
                taken = functional.pad(rows, (0, few_counts(count, len(x)) - count))
            added = linear(ffn.neurons(x.index_select(0, taken), start, stop), ffn.columns(start, stop))
            total.index_add_(0, rows, added[:count].to(total.dtype))
    return total.to(x.dtype)


@torch.no_grad()
def masked_ffn(ffn: BlockedFFN, x: Tensor, on: Tensor) -> Tensor:
    """The FFN of each token restricted to its own blocks, every neuron computed.

    Arguments and result as :func:`union_ffn`.
    """
    hidden = ffn.neurons(x, 0, ffn.partition.neurons)
    Off.of(ffn.partition, on).clear(hidden, 0)
    return linear(hidden, ffn.weights.down, ffn.weights.down_bias)


def runs(used: Sequence[bool]) -> list[tuple[int, int]]:
    """First block and the one behind the last of every run of blocks in ``used`` (N,), in order."""
    return [run.span() for run in re.finditer(b"\x01+", bytes(used))]


def pieces(used: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Runs of neurons ``[start, stop)`` in order, those together that lie no more than :data:`GAP` apart."""
    joined: list[list[tuple[int, int]]] = []
    for run in used:
        if joined and run[0] - joined[-1][-1][1] <= GAP:
            joined[-1].append(run)
        else:
            joined.append([run])
    return joined


class Off(NamedTuple):
    """What tokens do not use, in blocks of one size but for the last.

    Attributes:
        size: Neurons a block.
        blocks: ``(M, n)`` bool.
    """

    size: int
    blocks: Tensor

    @classmethod
    def of(cls, partition: Partition, on: Tensor) -> Off:
        """The reverse of ``on`` (M, N); neuron by neuron where the blocks are uneven."""
        return cls(partition.block_size, ~on) if partition.block_size else cls(1, partition.spread(~on))

    def clear(self, hidden: Tensor, start: int) -> None:
        """Puts to zero what is off in ``hidden`` (M, n), the neurons from ``start`` on, where a block begins."""
        size, first = self.size, start // self.size
        whole, rest = divmod(hidden.shape[1], size)
        off = self.blocks[:, first : first + whole, None]
        hidden[:, : whole * size].unflatten(1, (whole, size)).masked_fill_(off, 0)
        if rest:
            hidden[:, whole * size :].masked_fill_(self.blocks[:, -1:], 0)


def _variant(ffn: BlockedFFN, x: Tensor, choice: Choice) -> str:
    assert isinstance(choice, Subset)
    return kernel_for(ffn, x, choice.on)[0]


CPU_ROUTED = Backend("cpu-routed", can_run, run, _variant)
