"""What one token costs at given shares of the FFNs' cost: FLOPs of a forward pass, and bytes read at batch 1.

Both shares are of the dense checkpoint's FFNs and count the routers, so that the parent and the full dial, where no
router runs, have shares of exactly 1. L layers, D residual width.
"""

from __future__ import annotations

from dataclasses import dataclass

from dynaconv.arch.checkpoint import Checkpoint


@dataclass(frozen=True)
class CostModel:
    """Counts of a dense checkpoint, from which the cost at any share follows.

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

    @classmethod
    def of(cls, checkpoint: Checkpoint, *, context: int) -> CostModel:
        """Counts ``checkpoint``.

        Args:
            checkpoint: The dense checkpoint.
            context: Mean tokens of context.
        """
        sizes, layers = checkpoint.sizes, checkpoint.layers
        attention, ffn = layers * checkpoint.attention_parameters, layers * checkpoint.ffn_parameters
        counted = attention + ffn + checkpoint.embedding_parameters
        counted += 0 if checkpoint.tied else checkpoint.head_parameters
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
        )

    def flops_per_token(self, ffn_flops_share: float) -> float:
        """FLOPs of one token's forward pass: two a weight, and attention over the context."""
        weights = self.attention + ffn_flops_share * self.ffn + self.head
        return 2.0 * weights + 4.0 * self.attention_width * self.context

    def bytes_per_token(self, ffn_bytes_share: float) -> float:
        """Bytes read for one token at batch 1: weights, one embedding row, the KV cache."""
        weights = self.attention + ffn_bytes_share * self.ffn + self.head + self.rest + self.residual
        return float(self.itemsize * (weights + self.cache_width * self.context))

    def bytes_per_step(self, ffn_bytes_share: float, sequences: int) -> float:
        """Bytes read for one step of decoding ``sequences`` together: weights once, all else for each of them."""
        own = self.itemsize * (self.residual + self.cache_width * self.context)
        return self.bytes_per_token(ffn_bytes_share) + (sequences - 1) * own
