"""A site: a place of the network where something can be left out. Ships with every exported model."""

from __future__ import annotations

from dataclasses import dataclass

from dynaconv.kernels.partition import Partition


@dataclass(frozen=True)
class Site:
    """The FFN of one decoder layer, whose blocks a token may use or not.

    Attributes:
        name: Such as ``layers.3.ffn``; unique in the model, and what recorded figures are filed under.
        index: Its place among the model's sites: the column of the threshold tensor that holds its threshold.
        partition: The blocks, and what each costs in neurons.
    """

    name: str
    index: int
    partition: Partition

    @property
    def blocks(self) -> int:
        """Number of blocks, N."""
        return self.partition.blocks
