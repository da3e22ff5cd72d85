"""What routing is held against at equal share: static widths, shuffled widths, and the oracle that knows the labels.

Duo-LLM (arXiv 2410.10846) finds learned routers often no better than fixed patterns, so every quality table has these
beside it. L layers, B batch, T tokens, N blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dynaconv.data.windows import Batch
from dynaconv.dynamic.context import recording, using
from dynaconv.dynamic.ffn import DynamicFFN
from dynaconv.dynamic.layout import RouterLayout
from dynaconv.dynamic.policy import Policy
from dynaconv.dynamic.router import Router
from dynaconv.kernels.partition import Partition
from dynaconv.profile.curves import BlockNorms, log_errors, log_norms, relative_errors

LARGEST = 50.0  # logarithm of a norm


class Replay:
    """Widths made beforehand, batch after batch in the order they were made.

    Args:
        widths: By layer, one (B, T) int64 tensor a batch.
    """

    def __init__(self, widths: Mapping[int, Sequence[Tensor]]) -> None:
        self.waiting = {layer: list(batches) for layer, batches in widths.items()}

    def decide(self, ffn: DynamicFFN, x: Tensor) -> Tensor | None:
        """The next batch's widths of the layer."""
        return self.waiting[ffn.layer].pop(0).to(x.device)


@torch.no_grad()
def recorded_widths(model: Any, batches: Sequence[Batch], policy: Policy) -> dict[int, list[Tensor]]:
    """The widths that ``policy`` gives every token of ``batches``, by layer and batch."""
    with recording() as trace:
        for batch in batches:
            with using(policy):
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return trace.widths


def shuffled(widths: Mapping[int, Sequence[Tensor]], seed: int) -> Replay:
    """The same widths in each layer and batch, given to tokens at random."""
    generator = torch.Generator().manual_seed(seed)
    return Replay(
        {
            layer: [w.flatten()[torch.randperm(w.numel(), generator=generator)].view_as(w) for w in batches]
            for layer, batches in widths.items()
        }
    )


def static_widths(means: Sequence[float], blocks: int) -> tuple[int, ...]:
    """One whole width a layer, as near to ``means`` as the same total allows (largest remainders)."""
    floors = [min(blocks, int(mean)) for mean in means]
    left = round(sum(means)) - sum(floors)
    by_remainder = sorted(range(len(means)), key=lambda layer: floors[layer] - means[layer])
    for layer in by_remainder[: max(0, left)]:
        floors[layer] = min(blocks, floors[layer] + 1)
    return tuple(floors)


class OracleRouter(Router):
    """Knows each token's true curve, as a perfect ``curve`` router would; of routed experts, what its blocks add."""

    def __init__(self, ffn: DynamicFFN) -> None:
        kind = "blocks" if ffn.router.kind == "blocks" else "curve"
        super().__init__(1, ffn.edges, RouterLayout(kind=kind, bound=LARGEST))
        self._ffn = [ffn]  # in a list: not a submodule, or the two would own each other

    def forward(self, x: Tensor) -> Tensor:
        """Log r_n of tokens ``x`` (..., D), or the log norm of what block n adds: (..., N)."""
        ffn = self._ffn[0]
        hidden, down = ffn.hidden(x).flatten(0, -2).float(), ffn.weights().down.float()
        if self.kind == "blocks":
            known = log_norms(BlockNorms(down, Partition.at(ffn.edges))(hidden))
        else:
            known = log_errors(relative_errors(hidden, down, ffn.edges))
        return known.view(*x.shape[:-1], ffn.blocks)


@contextmanager
def oracle_routers(model: Any) -> Iterator[None]:
    """Every router of ``model`` knows the labels inside."""
    kept = [ffn.router for ffn in model.ffns()]
    try:
        for ffn in model.ffns():
            ffn.router = OracleRouter(ffn)
        yield
    finally:
        for ffn, router in zip(model.ffns(), kept, strict=True):
            ffn.router = router
