"""The micro-batches of a step: what each rank computes of them, and how much it counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dynaconv.data.windows import Batch
from dynaconv.ranks import Ranks


@dataclass(frozen=True)
class MicroBatch:
    """This rank's share of one micro-batch. Gradients and metrics are averaged over ranks.

    Attributes:
        batch: The sequences.
        weights: Weight in the step of a mean over its ``scored`` tokens, and of one over ``all`` but padding: its share
            of the step's tokens, times the number of ranks.
        last: Whether the step's backward passes end with it.
    """

    batch: Batch
    weights: Mapping[str, float]
    last: bool


def micro_batches(batch: Batch, accumulation: int, ranks: Ranks, device: torch.device) -> list[MicroBatch]:
    """A step's batch in ``accumulation`` parts, of each the rows of this rank.

    Together they are the same for any number of ranks and of parts.
    """
    real, scored = batch.tokens, max(1, int(batch.predicted.sum()))
    parts = [part.rows(*ranks.rows(len(part.input_ids))) for part in batch.split(accumulation)]
    return [
        MicroBatch(
            batch=part.to(device),
            weights={
                "scored": ranks.world * int(part.predicted.sum()) / scored,
                "all": ranks.world * part.tokens / real,
            },
            last=place == len(parts),
        )
        for place, part in enumerate(parts, 1)
    ]
