"""What profile leaves on disk and carve reads: ``statistics.json`` and ``statistics.safetensors``.

D residual width, F FFN width, N blocks, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import torch

from dynaconv.artifacts.files import write_json
from dynaconv.artifacts.writer import CheckpointWriter, TensorLayout
from dynaconv.kernels.partition import Partition

SCHEMA = 3  # 1 had edges, at most 65 of them, in place of a partition; 2 no single neurons
SUMMARY_FILE = "statistics.json"
PREFIX = "statistics"
TENSOR_FILE = f"{PREFIX}.safetensors"
ONE_FILE = 2**62  # bytes: more than any file


@dataclass(frozen=True)
class Summary:
    """Content of ``statistics.json``. Holds no times: the same inputs give the same bytes.

    Attributes:
        tokens: Calibration tokens, padding left out.
        curve_tokens: Tokens that difficulty curves were measured on.
        layers: L.
        partition: How each FFN is cut into blocks.
        curve_widths: Widths, in blocks, that difficulty curves were measured at.
        loss: The parent's, nats a token on the calibration text.
        experts: ``neurons``, ``routed`` or ``nested``.
        order: ``importance`` or ``none``; of routed experts neurons are ordered by cluster.
        loss_aware: Whether curves are weighted by the gradient of the loss.
        data: Digest of the calibration text.
        seed: What drew the windows.
        dtype: What it was computed in.
    """

    tokens: int
    curve_tokens: int
    layers: int
    partition: Partition
    curve_widths: tuple[int, ...]
    loss: float
    experts: str
    order: str
    loss_aware: bool
    data: str
    seed: int
    dtype: str

    def save(self, folder: Path) -> None:
        """Writes ``statistics.json``.

        Raises:
            ArtifactError: The disk is full, read-only or not accessible.
        """
        content = {**asdict(self), "partition": self.partition.to_json()}
        write_json(folder / SUMMARY_FILE, {"schema": SCHEMA, **content})


def tensor_layout(
    layers: int, residual: int, partition: Partition, widths: Sequence[int], experts: str
) -> list[TensorLayout]:
    """Name, dtype and shape of every tensor: ``layers.{l}.<what>``, as :func:`measure_layer` returns them.

    ``activation`` is mean |h|, ``importance`` that times the norm of the neuron's down column, ``order`` the neurons
    as they are cut. ``curve_mean`` and ``curve_quantiles`` (.1, .5, .9) are of r_n at ``widths``. ``feature_gram`` is
    the sum over curve tokens of [x; 1][x; 1]^T with x the FFN's input, ``feature_target`` that of [x; 1] log t_n,
    n = 0..N-1, with t_n = r_n, or the norm of what block n adds where experts are routed, times the token's weight
    where curves are loss-aware. Where experts are single ``neurons`` there are in place of curves ``level``, the
    logarithm of what a neuron adds that stands at a certain share from the top, and ``up_mean``, mean |up x| / ||x||.
    """
    neurons = partition.neurons
    of_neurons = {"level": (torch.float32, ()), "up_mean": (torch.float32, (neurons,))}
    of_blocks = {
        "curve_mean": (torch.float32, (len(widths),)),
        "curve_quantiles": (torch.float32, (3, len(widths))),
        "feature_gram": (torch.float32, (residual + 1, residual + 1)),
        "feature_target": (torch.float32, (residual + 1, partition.blocks)),
    }
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "activation": (torch.float32, (neurons,)),
        "importance": (torch.float32, (neurons,)),
        "order": (torch.int64, (neurons,)),
        **(of_neurons if experts == "neurons" else of_blocks),
    }
    return [(f"layers.{i}.{name}", dtype, shape) for i in range(layers) for name, (dtype, shape) in shapes.items()]


def layout_bytes(layout: Sequence[TensorLayout]) -> int:
    """Bytes of all tensors of ``layout``."""
    return sum(dtype.itemsize * prod(shape) for _, dtype, shape in layout)


def open_writer(folder: Path, layout: Sequence[TensorLayout]) -> CheckpointWriter:
    """Writes ``statistics.safetensors`` tensor by tensor, so that one layer's are in memory at a time.

    Raises:
        ArtifactError: The disk is full, read-only or not accessible.
    """
    return CheckpointWriter(folder, layout, shard_bytes=ONE_FILE, prefix=PREFIX)
