"""Subclones of tiny checkpoints, and importance that was drawn or measured on random tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.arch.spec import Slot
from dynaconv.artifacts.tensors import CheckpointReader, write_tensors
from dynaconv.config import SubcloneConfig
from dynaconv.convert.importance import Importance
from dynaconv.convert.resize import Resize, write_resized
from dynaconv.convert.subclone import plan_subclone
from dynaconv.data.windows import Batch
from dynaconv.profile.importance import measure_importance
from dynaconv.profile.streaming import LayerStream

TOKENS = torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(1))


def random_importance(checkpoint: Checkpoint, seed: int = 0) -> Importance:
    """Scores in random order."""
    made = torch.Generator().manual_seed(seed)
    sizes, layers = checkpoint.sizes, checkpoint.layers
    return Importance(
        residual=torch.rand(sizes["residual"], generator=made),
        neurons=torch.rand(layers, sizes["ffn"], generator=made),
        attention=torch.rand(layers, sizes["q_head"], sizes["v_dim"], generator=made),
        influence=torch.rand(layers, generator=made),
        query_key=torch.rand(layers, sizes["q_dim"], generator=made),
        measured=True,
        loss=1.0,
    )


def measured_importance(checkpoint: Checkpoint, folder: Path, *, second_moments: bool = False) -> Importance:
    """Scores measured on random tokens."""
    folder.mkdir()
    stream = LayerStream(checkpoint, torch.device("cpu"))
    measure_importance(stream, [Batch(TOKENS), Batch(TOKENS.flip(0, 1))], folder, second_moments=second_moments)
    return Importance.open(folder, checkpoint)


def subcloned(checkpoint: Checkpoint, importance: Importance, wanted: SubcloneConfig, folder: Path) -> Resize:
    """Writes the subclone of ``checkpoint`` into ``folder``."""
    resize = plan_subclone(checkpoint, importance, wanted)
    folder.mkdir()
    write_resized(checkpoint, resize, folder, shard_bytes=2**40)
    Checkpoint.open(folder)
    return resize


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    """What stock transformers computes from ``folder``, (2, 24, 257), when it finds all it needs and nothing else."""
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    found: Tensor = model.eval()(TOKENS).logits
    return found


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected."""
    return float((found - expected).abs().max() / expected.abs().max())


def edited(folder: Path, edit: Callable[[Slot, Tensor], None]) -> Checkpoint:
    """``folder``, each of its tensors changed in place by ``edit``."""
    checkpoint, reader = Checkpoint.open(folder), CheckpointReader(folder)
    tensors = {name: reader.read(name) for name in reader.tensors}
    for name, slot in checkpoint.slots.items():
        edit(slot, tensors[name])
    write_tensors(folder / "model.safetensors", tensors)
    return Checkpoint.open(folder)


def positions(slot: Slot, number: int, checkpoint: Checkpoint, at: dict[str, Tensor]) -> Tensor:
    """Positions of ``at`` (by axis) along dimension ``number`` of ``slot``."""
    return slot.spec.dimensions[number].positions(checkpoint.sizes, at.get)
