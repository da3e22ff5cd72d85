"""What one token costs at a given active share: FLOPs of a forward pass, and bytes read at batch 1.

Routers cost what they cost where they run: everywhere but at the full dial. L layers, N blocks, D residual width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.dynamic.routers.base import Router


@dataclass(frozen=True)
class CostModel:
    """Counts of a checkpoint, from which the cost at any share follows.

    Attributes:
        attention: Elements of all attention projections.
        ffn: Elements of all FFN projections.
        head: Elements of the output head.
        rest: Elements of norms and other vectors.
        residual: D, one row of the embedding is read for a token.
        attention_width: Query heads times head_dim, times L.
        cache_width: Key and value heads times head_dim, times L.
        context: Tokens of context a token attends to.
        itemsize: Bytes of one weight.
        router_flops: FLOPs of all routers, for one token.
        router_bytes: Bytes that all routers read for one token.
    """

    attention: int
    ffn: int
    head: int
    rest: int
    residual: int
    attention_width: int
    cache_width: int
    context: int
    itemsize: int
    router_flops: int = 0
    router_bytes: int = 0

    @classmethod
    def of(cls, checkpoint: Checkpoint, *, context: int, routers: Iterable[Router] = ()) -> CostModel:
        """Counts ``checkpoint``, and what each of ``routers`` says of itself.

        Args:
            checkpoint: The dense checkpoint.
            context: Mean tokens of context.
            routers: One a site; none for the parent.
        """
        sizes, layers = checkpoint.sizes, checkpoint.layers
        attention, ffn = layers * checkpoint.attention_parameters, layers * checkpoint.ffn_parameters
        counted = attention + ffn + checkpoint.embedding_parameters
        counted += 0 if checkpoint.tied else checkpoint.head_parameters
        routers = list(routers)
        return cls(
            attention=attention,
            ffn=ffn,
            head=checkpoint.head_parameters,
            rest=checkpoint.parameters - counted,
            residual=sizes["residual"],
            attention_width=layers * sizes["q_head"] * sizes["v_dim"],
            cache_width=2 * layers * sizes.get("kv_head", sizes["q_head"]) * sizes["v_dim"],
            context=context,
            itemsize=checkpoint.dtype.itemsize,
            router_flops=sum(router.flops_per_token for router in routers),
            router_bytes=sum(router.bytes_per_token for router in routers),
        )

    def without_routers(self) -> CostModel:
        """The same checkpoint at the full dial, where no router runs."""
        return replace(self, router_flops=0, router_bytes=0)

    def flops_per_token(self, share: float) -> float:
        """FLOPs of one token's forward pass: two a weight, and attention over the context."""
        weights = self.attention + share * self.ffn + self.head
        return 2.0 * weights + 4.0 * self.attention_width * self.context + self.router_flops

    def bytes_per_token(self, share: float) -> float:
        """Bytes read for one token at batch 1: active weights, one embedding row, the KV cache, the routers."""
        weights = self.attention + share * self.ffn + self.head + self.rest + self.residual
        return float(self.itemsize * (weights + self.cache_width * self.context) + self.router_bytes)
