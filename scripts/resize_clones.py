"""Clones for ``bench_resize.py``: what they are made from, making them, and how far their copies are apart.

B windows in a batch, T tokens in a window, D residual width of the source, F its FFN width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from resize_rows import Row
from torch import Tensor

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.config import HypercloneConfig, SubcloneConfig
from dynaconv.convert.hyperclone import plan_hyperclone
from dynaconv.convert.importance import Importance
from dynaconv.convert.resize import write_resized
from dynaconv.convert.subclone import plan_subclone
from dynaconv.data.windows import Batch
from dynaconv.profile.importance import SUMMARY_FILE, measure_importance
from dynaconv.profile.streaming import LayerStream

# What each variant asks for beyond a clone by default.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "subclone": {
        "": {},
        "without rescale": {"rescale": False},
        "without ordering": {"order": "none"},
    },
    "hyperclone": {"": {}, "without noise": {"variant": "symmetric"}},
}
SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class Sources:
    """What clones are made from.

    Attributes:
        large: Checkpoint that is subcloned to half its width.
        importance: Folder with what was measured on it.
        small: Checkpoint that is hypercloned to twice its width.
    """

    large: Path
    importance: Path
    small: Path

    @classmethod
    def measured(cls, large: Path, small: Path, folder: Path, batches: Sequence[Batch]) -> Sources:
        """Measures the importance of ``large`` on ``batches``, or finds it in ``folder``."""
        if not (folder / SUMMARY_FILE).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            measure_importance(LayerStream(Checkpoint.open(large)), batches, folder)
        return cls(large, folder, small)

    def clone(self, row: Row) -> Any:
        """The model that ``row`` starts from, in fp32."""
        from transformers import AutoModelForCausalLM

        wanted = VARIANTS[row.start][row.variant]
        checkpoint = Checkpoint.open(self.large if row.start == "subclone" else self.small)
        if row.start == "subclone":
            sizes = checkpoint.sizes
            half: dict[str, Any] = {"residual": sizes["residual"] // 2, "ffn": sizes["ffn"] // 2}
            half |= {"heads": sizes["q_head"] // 2, "kv_heads": sizes["kv_head"] // 2}
            importance = Importance.open(self.importance, checkpoint)
            resize = plan_subclone(checkpoint, importance, SubcloneConfig(**half, **wanted))
        else:
            resize = plan_hyperclone(checkpoint, HypercloneConfig(factor=2, **wanted), row.seed)
        with tempfile.TemporaryDirectory() as folder:
            write_resized(checkpoint, resize, Path(folder), shard_bytes=SHARD_BYTES)
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def separation(batch: Batch) -> Callable[[Any], dict[str, float]]:
    """Measures how far apart the copies in a twofold hyperclone are, relative to what they are copies of.

    ``weights`` compares what the two copies of each neuron read with (rows of the FFNs' first projections, (2 F, 2 D)),
    ``activations`` the two halves of the last hidden state (B, T, 2 D) on ``batch``. Noise sets weights apart from the
    start and leaves activations equal: it changes no output.
    """

    @torch.no_grad()
    def measure(model: Any) -> dict[str, float]:
        was_training = model.training
        model.eval()
        hidden = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        model.train(was_training)
        projections = [layer.mlp.gate_proj.weight for layer in model.model.layers]
        weights = [_distance(weight[0::2], weight[1::2]) for weight in projections]  # copies of a neuron are neighbours
        return {"weights": sum(weights) / len(weights), "activations": _distance(*hidden.chunk(2, -1))}

    return measure


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / one.norm())
