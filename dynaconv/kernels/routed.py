"""Inference on a CPU where each token has blocks of its own choice. Ships with every exported model.

Weights are used where they lie: a block is a slice of the rows of gate and up and of the columns of down. Both kernels
read no block that no token uses, but for columns of down in small gaps, and differ in what they compute of the others:

* ``union_ffn``: every token gets every block that some token uses, then what a token did not ask for is put to zero.
  For one token that is exactly its own blocks; for a few, arithmetic in vain is cheaper than further steps.
* ``grouped_ffn``: block by block, on the tokens that use it, gathered; results are added up where they belong.

They are for inference; ``reference`` is for training.

Shapes: M tokens, D residual width, F neurons, N blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import groupby, pairwise
from operator import or_

import torch
from torch.nn import functional
from torch.nn.functional import linear

from dynaconv.kernels.cpu import STEP_COST, few_counts, neurons, no_blocks, step_cost
from dynaconv.kernels.reference import blocks_on
from dynaconv.kernels.weights import FFNWeights

GAP = 384
"""Columns of down that are read in the time that beginning another piece takes: its rows lie on pages of their own.
Found at D 2048, F 8192, one token, fp32: with pieces of 128 to 512 columns, beginning one costs 320 to 500."""


@torch.no_grad()
def union_ffn(x: torch.Tensor, masks: torch.Tensor, weights: FFNWeights, edges: Sequence[int]) -> torch.Tensor:
    """The FFN of each token restricted to its own blocks, computed on all that any of them uses.

    Arguments and result as :func:`~dynaconv.kernels.dispatch.routed_ffn`; nothing is recorded for gradients.
    """
    blocks, union = len(edges) - 1, reduce(or_, masks.tolist(), 0)
    off = None if len(x) == 1 else ~blocks_on(masks, blocks)
    total: torch.Tensor | None = None
    for piece in pieces([(edges[first], edges[end]) for first, end in runs(union, blocks)]):
        start, stop = piece[0][0], piece[-1][1]
        hidden = x.new_zeros(len(x), stop - start) if len(piece) > 1 else x.new_empty(len(x), stop - start)
        for a, b in piece:
            neurons(x, weights, a, b, out=hidden[:, a - start : b - start])
        if off is not None:
            _clear(hidden, off, edges, start, stop)
        down = weights.down.narrow(1, start, stop - start)
        total = linear(hidden, down, weights.down_bias) if total is None else total.addmm_(hidden, down.t())
    return no_blocks(x, weights) if total is None else total


@torch.no_grad()
def grouped_ffn(x: torch.Tensor, masks: torch.Tensor, weights: FFNWeights, edges: Sequence[int]) -> torch.Tensor:
    """The FFN of each token restricted to its own blocks, each block computed for the tokens that use it.

    Arguments and result as :func:`union_ffn`, which does more arithmetic in fewer steps. Added up in fp32 at least.
    """
    on, total = blocks_on(masks, len(edges) - 1), no_blocks(x, weights)
    total = total.to(torch.promote_types(x.dtype, torch.float32))
    for block, count in enumerate(on.sum(0).tolist()):
        start, stop = edges[block], edges[block + 1]
        down = weights.down.narrow(1, start, stop - start)
        if count == len(x):
            total += linear(neurons(x, weights, start, stop), down)
        elif count:
            rows = on[:, block].nonzero()[:, 0]
            taken = rows
            if x.dtype in STEP_COST:  # the first row again, for nothing
                taken = functional.pad(rows, (0, few_counts(count, len(x)) - count))
            added = linear(neurons(x.index_select(0, taken), weights, start, stop), down)
            total.index_add_(0, rows, added[:count].to(total.dtype))
    return total.to(x.dtype)


def grouping_pays(x: torch.Tensor, masks: torch.Tensor, edges: Sequence[int]) -> bool:
    """Whether :func:`grouped_ffn` saves more multiply-adds than its further steps cost."""
    counts = blocks_on(masks, len(edges) - 1).sum(0).tolist()
    union = [(block, count) for block, count in enumerate(counts) if count]
    in_vain = sum((edges[block + 1] - edges[block]) * (len(x) - count) for block, count in union)
    return in_vain * x.shape[1] > len(union) * step_cost(x.dtype)


def runs(mask: int, blocks: int) -> Iterator[tuple[int, int]]:
    """First block and the one behind the last of every run of set bits of ``mask``, a block a bit, in order."""
    for used, members in groupby(range(blocks), key=lambda block: mask >> block & 1):
        if used:
            run = list(members)
            yield run[0], run[-1] + 1


def pieces(used: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Runs of neurons ``[start, stop)`` in order, those together that lie no more than :data:`GAP` apart."""
    joined: list[list[tuple[int, int]]] = []
    for run in used:
        if joined and run[0] - joined[-1][-1][1] <= GAP:
            joined[-1].append(run)
        else:
            joined.append([run])
    return joined


def _clear(hidden: torch.Tensor, off: torch.Tensor, edges: Sequence[int], start: int, stop: int) -> None:
    """Puts to zero what tokens computed of blocks that are ``off`` (M, N) for them, in neurons [start, stop)."""
    first, end = edges.index(start), edges.index(stop)
    if len({b - a for a, b in pairwise(edges[first : end + 1])}) == 1:
        hidden.unflatten(1, (end - first, -1)).masked_fill_(off[:, first:end, None], 0)
        return
    for block in range(first, end):
        hidden[:, edges[block] - start : edges[block + 1] - start].masked_fill_(off[:, block, None], 0)
