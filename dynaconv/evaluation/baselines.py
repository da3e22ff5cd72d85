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
from dynaconv.dynamic.ffn import DynamicFFN
from dynaconv.dynamic.layout import RouterLayout
from dynaconv.dynamic.policy import Decision, Policy
from dynaconv.dynamic.recorder import Recorder
from dynaconv.dynamic.routers.base import Router
from dynaconv.dynamic.routers.kinds import KINDS
from dynaconv.dynamic.site import Site
from dynaconv.kernels.choice import Prefix
from dynaconv.profile.curves import BlockNorms, log_errors, log_norms, relative_errors

LARGEST = 50.0  # logarithm of a norm


class Replay:
    """Widths made beforehand, batch after batch in the order they were made.

    Args:
        widths: By site, one (B, T) int64 tensor a batch.
    """

    def __init__(self, widths: Mapping[int, Sequence[Tensor]]) -> None:
        self.waiting = {layer: list(batches) for layer, batches in widths.items()}

    def decide(self, site: Site, router: Router, x: Tensor) -> Decision:
        """The next batch's widths of the site."""
        return Decision(Prefix(self.waiting[site.index].pop(0).to(x.device)))


@torch.no_grad()
def recorded_widths(model: Any, batches: Sequence[Batch], policy: Policy) -> dict[int, list[Tensor]]:
    """The widths that ``policy`` gives every token of ``batches``, by layer and batch."""
    recorder = Recorder()
    for batch in batches:
        with model.call.using(policy, recorder):
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return recorder.widths


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


def oracle_router(ffn: DynamicFFN) -> Router:
    """A router that knows each token's true curve, or what each of its blocks adds: a perfect router of its kind."""
    rule = KINDS["linear" if ffn.router.experts == "routed" else "curve"]

    class Oracle(rule):  # type: ignore[valid-type, misc]
        """The rule of its kind over what it knows."""

        def forward(self, x: Tensor) -> Tensor:
            """Log r_n of tokens ``x`` (..., D), or the log norm of what block n adds: (..., N)."""
            hidden, down = ffn.hidden(x).flatten(0, -2).float(), ffn.blocked().weights.down.float()
            if self.experts == "routed":
                known = log_norms(BlockNorms(down, ffn.site.partition)(hidden))
            else:
                known = log_errors(relative_errors(hidden, down, ffn.site.partition.edges))
            return known.view(*x.shape[:-1], self.blocks)

    return Oracle(1, ffn.site.partition, RouterLayout(kind=rule.kind, bound=LARGEST))


@contextmanager
def oracle_routers(model: Any) -> Iterator[None]:
    """Every router of ``model`` knows the labels inside."""
    kept = [ffn.router for ffn in model.ffns()]
    try:
        for ffn in model.ffns():
            ffn.router = oracle_router(ffn)
        yield
    finally:
        for ffn, router in zip(model.ffns(), kept, strict=True):
            ffn.router = router
