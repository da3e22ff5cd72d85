"""Difficulty curves: how much of its FFN output a token loses at every width, and the labels that follow from it.

Width n of N keeps the first n blocks of neurons. With y_n the output of the first n blocks and y the full one (down
bias left out of both), a token's curve is r_n = ||y_n - y|| / ||y||: r_0 = 1 and r_N = 0. Nested experts after
DynaMoE (arXiv 2502.12325), whose label is the class :func:`width_by_error` or :func:`width_by_cosine` reads off the
curve; regressing the curve itself follows D2DMoE (arXiv 2310.04361).

Of routed experts a curve says what is lost where only the n blocks that add most to the token are kept.

Shapes: M tokens, D residual width, F neurons, N blocks. Every function is pure and takes no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from dynaconv.kernels.partition import Partition

PARTS = 2**22  # elements of the down projection that are factored at once
ALL_WIDTHS = 8  # blocks of routed experts up to which every width is measured
QUARTERS = 4
FLOOR = 1e-4  # errors and weights below this are told apart by nobody, and their logarithm would rule a regression


class Agreement(NamedTuple):
    """How the first n blocks agree with all of them, for n = 0..N.

    Attributes:
        errors: ``(M, N + 1)`` float32, r_n.
        cosines: ``(M, N + 1)`` float32, cosine of y_n and y; 0 at width 0 and 1 at width N.
    """

    errors: torch.Tensor
    cosines: torch.Tensor


@torch.no_grad()
def relative_errors(
    hidden: torch.Tensor, down: torch.Tensor, edges: Sequence[int], order: torch.Tensor | None = None
) -> torch.Tensor:
    """Relative error of every width, at the cost of one down projection.

    What width n lacks is the sum of the blocks from n on, so the blocks are added up from the last to the first.

    Args:
        hidden: ``(M, F)``, what goes into the down projection.
        down: ``(D, F)``, its weight.
        edges: N + 1 neuron positions.
        order: ``(F,)`` int64, neurons in the order they are cut in; ``None`` where they are in order already.

    Returns:
        ``(M, N + 1)`` float32. A token whose full output is zero has r_n = 1 at every width below N.
    """
    lacking = hidden.new_zeros((hidden.shape[0], down.shape[0]), dtype=torch.float32)
    norms = hidden.new_zeros((hidden.shape[0], len(edges)), dtype=torch.float32)
    for block in reversed(range(len(edges) - 1)):
        lacking += _block_output(hidden, down, edges, block, order)
        norms[:, block] = torch.linalg.vector_norm(lacking, dim=-1)
    return _relative(norms, norms[:, :1])


@torch.no_grad()
def agreements(
    hidden: torch.Tensor,
    down: torch.Tensor,
    edges: Sequence[int],
    order: torch.Tensor | None = None,
    full: torch.Tensor | None = None,
) -> Agreement:
    """Relative error and cosine of every width, at the cost of two down projections, or one where ``full`` is known.

    Args:
        hidden: ``(M, F)``.
        down: ``(D, F)``.
        edges: N + 1 neuron positions.
        order: ``(F,)`` int64, or ``None``.
        full: ``(M, D)``, the output of all blocks without the down bias.

    Returns:
        Both, float32. A token whose full output is zero has error 1 and cosine 0 below width N.
    """
    full = (linear(hidden, down) if full is None else full).float()
    size = torch.linalg.vector_norm(full, dim=-1, keepdim=True)
    lacking = torch.zeros_like(full)
    norms = full.new_zeros((full.shape[0], len(edges)))
    cosines = torch.ones_like(norms)
    for block in reversed(range(len(edges) - 1)):
        lacking += _block_output(hidden, down, edges, block, order)
        norms[:, block] = torch.linalg.vector_norm(lacking, dim=-1)
        kept = full - lacking
        scale = torch.linalg.vector_norm(kept, dim=-1) * size[:, 0]
        cosines[:, block] = (kept * full).sum(-1) / scale.clamp_min(torch.finfo(torch.float32).tiny)
    cosines[:, 0] = 0.0
    return Agreement(_relative(norms, size), cosines.clamp_(-1.0, 1.0))


class BlockNorms:
    """The norm of what each block of routed experts adds to a token's output, ||D_n h_n||.

    With D_n = Q_n R_n, Q_n orthonormal, it is ||R_n h_n||: F x block_size products a token in place of F x D, as with
    the Gram matrix R_n^T R_n, but without squaring, so that small norms keep the accuracy of float32.

    Args:
        down: ``(D, F)``.
        partition: The blocks.
    """

    @torch.no_grad()
    def __init__(self, down: torch.Tensor, partition: Partition) -> None:
        self._partition = partition
        self._groups: list[tuple[slice, slice, torch.Tensor]] = []  # blocks, their neurons, ``(n, R, size)`` factors
        for first, stop in partition.runs:
            start, end, size = partition.edges[first], partition.edges[stop], partition.sizes[first]
            self._groups.append((slice(first, stop), slice(start, end), _factors(down[:, start:end], size)))

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Activations ``(M, F)`` to norms ``(M, N)`` float32."""
        norms = hidden.new_empty((len(hidden), self._partition.blocks), dtype=torch.float32)
        for blocks, neurons, factors in self._groups:
            h = hidden[:, neurons].float()
            if factors.shape[1:] == (1, 1):
                torch.mul(h.abs(), factors.flatten().abs(), out=norms[:, blocks])
            else:
                parts = torch.einsum("mnb,nrb->nmr", h.unflatten(1, (-1, factors.shape[2])), factors)
                norms[:, blocks] = torch.linalg.vector_norm(parts, dim=-1).T
        return norms


def _factors(down: torch.Tensor, size: int) -> torch.Tensor:
    """R of every block of ``size`` neurons of ``down`` (D, n size): ``(n, R, size)`` float32, R at most D."""
    stacks = down.unflatten(1, (-1, size)).transpose(0, 1)  # (n, D, size), a view
    if size == 1:
        return torch.linalg.vector_norm(stacks, dim=1, keepdim=True, dtype=torch.float32)
    if size >= down.shape[0]:
        return stacks.float()
    at_once = max(1, PARTS // (size * down.shape[0]))
    return torch.cat([torch.linalg.qr(piece.float(), mode="r").R for piece in torch.split(stacks, at_once)])


@torch.no_grad()
def best_block_errors(
    hidden: torch.Tensor, down: torch.Tensor, partition: Partition, norms: torch.Tensor, widths: Sequence[int]
) -> torch.Tensor:
    """Relative error of keeping only the n blocks that add most to each token, one down projection a width.

    Args:
        hidden: ``(M, F)``.
        down: ``(D, F)``.
        partition: The blocks.
        norms: ``(M, N)``, what each block adds (:class:`BlockNorms`); among equals, earlier blocks come first.
        widths: n, ascending from 0 to N.

    Returns:
        ``(M, len(widths))`` float32.
    """
    order = norms.argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    full = torch.linalg.vector_norm(linear(hidden, down).float(), dim=-1, keepdim=True)
    errors = full.expand(-1, len(widths)).clone()
    for column, width in enumerate(widths[1:-1], 1):
        lacking = hidden * partition.spread((place >= width).to(hidden.dtype))
        errors[:, column] = torch.linalg.vector_norm(linear(lacking, down).float(), dim=-1)
    return _relative(errors, full)


def curve_widths(partition: Partition, experts: str) -> tuple[int, ...]:
    """Widths that the error curve is measured at, from 0 to N.

    All of nested experts, which share the work, and where there are at most 8 blocks; else the quarters: each width of
    routed experts costs a down projection of its own, and the whole should cost no more than the FFN.
    """
    blocks = partition.blocks
    if experts == "nested" or blocks <= ALL_WIDTHS:
        return tuple(range(blocks + 1))
    return tuple(round(quarter * blocks / QUARTERS) for quarter in range(QUARTERS + 1))


def log_norms(norms: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """What a closed-form ``linear`` router predicts: the logarithm of what each block adds.

    Args:
        norms: ``(M, N)``.
        weights: ``(M,)``, sensitivity of the loss to the token's output (mean 1 over tokens and layers); ``None`` is 1.

    Returns:
        ``(M, N)`` float32. Norms are cut off below at :data:`FLOOR` of the token's largest.
    """
    lowest = (FLOOR * norms.amax(1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    targets = torch.maximum(norms, lowest).log()
    return targets if weights is None else targets + weights.clamp_min(FLOOR).log()[:, None]


def width_by_error(errors: torch.Tensor, theta: float) -> torch.Tensor:
    """The smallest width whose relative error is at most 1 - theta: ``(M, N + 1)`` to ``(M,)`` int64."""
    return (errors <= 1.0 - theta).int().argmax(-1)


def width_by_cosine(cosines: torch.Tensor, theta: float) -> torch.Tensor:
    """The smallest width whose output has a cosine of at least theta: ``(M, N + 1)`` to ``(M,)`` int64."""
    enough = cosines >= theta
    enough[..., -1] = True  # the full width agrees by definition, whatever rounding says
    return enough.int().argmax(-1)


def log_errors(errors: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """What a ``curve`` router predicts: the logarithm of the error of every width below the full one.

    Args:
        errors: ``(M, N + 1)``, r_n.
        weights: ``(M,)``, sensitivity of the loss to an error (mean 1 over tokens and layers), or ``None`` for 1.

    Returns:
        ``(M, N)`` float32, log t_n with t_n = r_n times the weight. Column 0 is the logarithm of the weight.
    """
    targets = errors[:, :-1].clamp_min(FLOOR).log()
    return targets if weights is None else targets + weights.clamp_min(FLOOR).log()[:, None]


def _block_output(
    hidden: torch.Tensor, down: torch.Tensor, edges: Sequence[int], block: int, order: torch.Tensor | None
) -> torch.Tensor:
    """What one block adds to the output: ``(M, D)``."""
    span = slice(edges[block], edges[block + 1])
    neurons = span if order is None else order[span]
    return linear(hidden[:, neurons], down[:, neurons])


def _relative(norms: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """``norms`` over ``full`` with exact ends: 1 at width 0, 0 at width N, and 1 in between where ``full`` is zero."""
    errors = torch.where(full > 0, norms / full, torch.ones_like(norms))
    errors[:, 0], errors[:, -1] = 1.0, 0.0
    return errors
