"""What the importance stage measured, checked against the checkpoint that is to be resized.

D residual width, F FFN width, L layers, Q query heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.artifacts.files import read_json
from dynaconv.artifacts.tensors import CheckpointReader
from dynaconv.convert.measured import require_same
from dynaconv.errors import ArtifactError

SUMMARY_FILE = "importance.json"
TENSOR_FILE = "importance.safetensors"


@dataclass(frozen=True)
class Importance:
    """Scores of one dense checkpoint, float32, not negative. Read them with :meth:`open`.

    Attributes:
        residual: (D,), one score of each residual channel for the whole network.
        neurons: (L, F).
        attention: (L, Q, d), of each channel that goes into the attention's output projection.
        influence: (L,), how much each layer changes what passes it.
        query_key: (L, d), of each channel of queries and keys; ``None`` where nothing is known of them.
        measured: Whether this was measured, and not taken for granted to plan with.
        loss: The parent's on the calibration text, nats a token.
        moments: Second moments of the output projections' inputs, ``layers.{l}.<what>``; ``None`` where they were not
            gathered.
    """

    residual: Tensor
    neurons: Tensor
    attention: Tensor
    influence: Tensor
    query_key: Tensor | None = None
    measured: bool = False
    loss: float = float("nan")
    moments: CheckpointReader | None = None

    @classmethod
    def open(cls, folder: Path, checkpoint: Checkpoint) -> Importance:
        """Reads the scores in ``folder``, which must be of ``checkpoint``.

        Raises:
            ArtifactError: A file is missing or damaged, or a score is not a finite number of at least 0.
            StaleArtifactError: They were measured on a checkpoint of another family or size.
        """
        summary = read_json(folder / SUMMARY_FILE)
        _check_source(summary, checkpoint, folder)
        reader = CheckpointReader.of_file(folder / TENSOR_FILE)

        def stacked(name: str) -> Tensor:
            return torch.stack([reader.read(f"layers.{layer}.{name}") for layer in range(checkpoint.layers)])

        scores = {
            "residual": reader.read("residual"),
            "neurons": stacked("neuron_importance"),
            "attention": stacked("attention_importance"),
            "query_key": stacked("query_key_activation"),
            "influence": stacked("influence").clamp_min(0),  # 1 - cosine may round to a little less than 0
        }
        for name, tensor in scores.items():
            if not bool(torch.isfinite(tensor).all()) or bool((tensor < 0).any()):
                found = "values that are negative, NaN or infinite"
                raise ArtifactError(f"importance of {name} is damaged", where=folder / TENSOR_FILE, found=found)
        moments = reader if summary["second_moments"] else None
        return cls(**scores, measured=True, loss=summary["loss"], moments=moments)

    @property
    def heads(self) -> Tensor:
        """Score of each query head: the mean of its channels', (L, Q)."""
        return self.attention.mean(2)


def _check_source(summary: Any, checkpoint: Checkpoint, folder: Path) -> None:
    require_same(
        summary,
        {
            "model_type": checkpoint.family.model_type,
            "sizes": dict(checkpoint.sizes),
            "layers": checkpoint.layers,
        },
        folder / SUMMARY_FILE,
        what="the importance was measured on another checkpoint than the one to be resized",
        hint="measure it again: --redo importance",
    )
