"""What profile measured, read one layer at a time and checked against what is to be carved.

D residual width, F neurons, N blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.artifacts.files import read_json
from dynaconv.artifacts.tensors import CheckpointReader
from dynaconv.errors import ArtifactError, StaleArtifactError
from dynaconv.kernels.partition import Partition
from dynaconv.profile.statistics import SCHEMA, SUMMARY_FILE, TENSOR_FILE


@dataclass(frozen=True)
class Measured:
    """Statistics of one dense checkpoint. Make one with :meth:`open`.

    Attributes:
        partition: The blocks that were measured.
        layers: Number of decoder layers, L.
        reader: The tensors, ``layers.{l}.<what>``.
    """

    partition: Partition
    layers: int
    reader: CheckpointReader

    @classmethod
    def open(cls, folder: Path, checkpoint: Checkpoint, partition: Partition, experts: str = "nested") -> Measured:
        """Opens the statistics in ``folder``, which must be of ``checkpoint`` cut so, for such experts.

        Raises:
            ArtifactError: A file is missing or damaged.
            StaleArtifactError: They were written by another version, or describe other experts or blocks, or another
                number of layers.
        """
        summary, where = read_json(folder / SUMMARY_FILE), folder / SUMMARY_FILE
        hint = "profile again: --redo profile"
        require_same(summary, {"schema": SCHEMA}, where, what="these statistics are of another version", hint=hint)
        require_same(
            summary,
            {"experts": experts, "layers": checkpoint.layers, "partition": partition.to_json()},
            where,
            what="the statistics were measured on something else than what is to be carved",
            hint=hint,
        )
        return cls(partition, checkpoint.layers, CheckpointReader.of_file(folder / TENSOR_FILE))

    def order(self, layer: int) -> Tensor:
        """(F,) int64: the neuron that comes first, second, ...

        Raises:
            ArtifactError: It is not a permutation, so neurons would be lost or doubled.
        """
        order = self.reader.read(f"layers.{layer}.order")
        neurons = torch.arange(self.partition.neurons)
        if order.dtype != torch.int64 or not torch.equal(order.sort().values, neurons):
            raise ArtifactError(
                f"the order of layer {layer} is not a permutation of its neurons",
                where=self.reader.info(f"layers.{layer}.order").file,
                expected=f"each of 0 to {self.partition.neurons - 1} once",
                hint="profile again",
            )
        return order

    def importance(self, layer: int) -> Tensor:
        """(F,) fp32, in the dense checkpoint's order of neurons."""
        return self.reader.read(f"layers.{layer}.importance")

    def sketched(self, layer: int) -> dict[str, Tensor]:
        """Tensors of a ``sketch`` router: ``offset`` () and ``up_mean`` (F,), fp32."""
        return {
            "offset": self.reader.read(f"layers.{layer}.level"),
            "up_mean": self.reader.read(f"layers.{layer}.up_mean"),
        }

    def sums(self, layer: int) -> tuple[Tensor, Tensor]:
        """``feature_gram`` (D + 1, D + 1) and ``feature_target`` (D + 1, N), as :func:`solve_ridge` takes them."""
        return self.reader.read(f"layers.{layer}.feature_gram"), self.reader.read(f"layers.{layer}.feature_target")


def require_same(summary: Any, expected: Mapping[str, Any], where: Path, *, what: str, hint: str) -> None:
    """Stops where the summary of a measurement, read from ``where``, is not of what is ``expected``.

    Raises:
        StaleArtifactError: Names the fields that differ.
    """
    found = {field: summary.get(field) if isinstance(summary, dict) else None for field in expected}
    differing = [field for field in expected if found[field] != expected[field]]
    if differing:
        raise StaleArtifactError(
            what,
            where=where,
            expected=", ".join(f"{field} {expected[field]!s:.200}" for field in differing),
            found=", ".join(f"{field} {found[field]!s:.200}" for field in differing),
            hint=hint,
        )
