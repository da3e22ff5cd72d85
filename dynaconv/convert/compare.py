"""Two checkpoints on the same tokens, side by side: by how much their logits differ, and what each one's loss is.

Both stream projection by projection, one after the other; at the end their heads run together over pieces of the
vocabulary, so neither a whole model nor whole logits are in memory. M tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.data.windows import Batch
from dynaconv.errors import CheckpointError
from dynaconv.profile.streaming import LayerStream


@dataclass(frozen=True)
class Comparison:
    """What two models make of the same tokens.

    Attributes:
        tokens: How many.
        difference: Largest |logit of the result - logit of the source|.
        relative: That over the largest |logit| of the source.
        agreement: Share of tokens whose likeliest successor is the same.
        source_loss: Nats a token.
        result_loss: Nats a token.
    """

    tokens: int
    difference: float
    relative: float
    agreement: float
    source_loss: float
    result_loss: float


def random_batches(vocabulary: int, *, windows: int, length: int, seed: int) -> list[Batch]:
    """One batch of ``windows`` windows of random tokens: what is to be exact must be so on any."""
    generator = torch.Generator().manual_seed(seed)
    return [Batch(torch.randint(vocabulary, (windows, length), generator=generator), None)]


def compare(
    source: Checkpoint, result: Checkpoint, batches: Sequence[Batch], *, trust_remote_code: bool = False
) -> Comparison:
    """Runs both on ``batches``.

    Raises:
        CheckpointError: A weight is NaN or infinite, or the result's logits are.
    """
    streams = [LayerStream(each, trust_remote_code=trust_remote_code) for each in (source, result)]
    hidden = [final_states(stream, batches) for stream in streams]
    flat = [torch.cat([each.flatten(0, 1) for each in states]) for states in hidden]
    best = [_Best(len(states)) for states in flat]
    difference = largest = 0.0
    heads = [stream.logits_pieces(states) for stream, states in zip(streams, flat, strict=True)]
    for (start, one), (_, other) in zip(*heads, strict=True):
        for each, logits in zip(best, (one, other), strict=True):
            each.add(start, logits)
        difference = max(difference, float((other - one).abs().max()))
        largest = max(largest, float(one.abs().max()))
    if not math.isfinite(difference):
        raise CheckpointError("logits are not finite", where=result.folder, found=f"a difference of {difference}")
    losses = [stream.loss(states, batches) for stream, states in zip(streams, hidden, strict=True)]
    return Comparison(
        tokens=len(flat[0]),
        difference=difference,
        relative=difference / max(largest, torch.finfo(torch.float32).tiny),
        agreement=float((best[0].token == best[1].token).double().mean()),
        source_loss=losses[0],
        result_loss=losses[1],
    )


def final_states(stream: LayerStream, batches: Sequence[Batch]) -> list[Tensor]:
    """What the last decoder layer gives for each of ``batches``: (B, T, D)."""
    hidden = stream.embed(batches)
    for index in range(stream.checkpoint.layers):
        with stream.layer(index, lean=len(batches) == 1) as layer:
            hidden = [stream.advance(index, layer, h, b) for h, b in zip(hidden, batches, strict=True)]
    return hidden


class _Best:
    """The likeliest of the tokens seen so far, for M positions."""

    def __init__(self, positions: int) -> None:
        self.logit = torch.full((positions,), -math.inf)
        self.token = torch.zeros(positions, dtype=torch.int64)

    def add(self, start: int, logits: Tensor) -> None:
        """Takes the logits (M, n) of the tokens from ``start`` on into account."""
        logit, place = logits.float().cpu().max(dim=1)
        better = logit > self.logit
        self.logit = torch.where(better, logit, self.logit)
        self.token = torch.where(better, place + start, self.token)
