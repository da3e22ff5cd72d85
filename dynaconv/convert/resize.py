"""A checkpoint in another shape: what subclone and hyperclone decide, and writing it.

A method is a pure function that returns a :class:`Resize`; everything that touches a disk is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynaconv.arch.checkpoint import CONFIG_FILE, Checkpoint, copy_side_files
from dynaconv.arch.spec import Slot
from dynaconv.arch.surgery import Finish, Rewrite, Take, transform
from dynaconv.artifacts.files import write_json
from dynaconv.artifacts.tensors import TensorInfo

LEFT_BEHIND = ("auto_map", "dynaconv")  # of an exported source: the dial does not survive another shape


@dataclass(frozen=True)
class Resize:
    """How a checkpoint becomes one of another shape.

    Attributes:
        config: Content of the result's ``config.json``.
        takes: The edits of its axes.
        layers: Old decoder layer that each new one is made from.
        rewrite: What to do to a whole tensor before the takes; see :func:`dynaconv.arch.surgery.transform`.
        finish: What to do to pieces of the result after them.
        summary: What was decided, for the manifest and the model card: JSON values.
        warnings: What the user should know.
    """

    config: Mapping[str, Any]
    takes: Sequence[Take]
    layers: Sequence[int]
    rewrite: Callable[[Slot], Rewrite | None] | None = None
    finish: Finish | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def dimensions(checkpoint: Checkpoint) -> dict[str, int]:
    """The sizes of a model as people say them, and its parameters."""
    sizes = checkpoint.sizes
    return {
        "layers": checkpoint.layers,
        "residual": sizes["residual"],
        "ffn": sizes["ffn"],
        "heads": sizes["q_head"],
        "kv_heads": sizes.get("kv_head", sizes["q_head"]),
        "head_dim": sizes["v_dim"],
        "vocab": sizes["vocab"],
        "parameters": checkpoint.parameters,
    }


def write_resized(
    checkpoint: Checkpoint,
    resize: Resize,
    folder: Path,
    *,
    shard_bytes: int,
    advance: Callable[[TensorInfo], None] | None = None,
) -> None:
    """Writes the resized checkpoint into ``folder``: weights, ``config.json``, tokenizer and what else comes along.

    Args:
        checkpoint: Where from.
        resize: What to do.
        folder: Where to.
        shard_bytes: Largest shard.
        advance: Called with each tensor that was read once what it gives is written.

    Raises:
        CheckpointError: A tensor holds NaN or infinity, or a stored copy of a tied tensor differs from it.
        ArtifactError: The disk is full, read-only or not accessible.
    """
    transform(
        checkpoint,
        resize.takes,
        folder,
        shard_bytes=shard_bytes,
        advance=advance,
        config=resize.config,
        layers=resize.layers,
        rewrite=resize.rewrite,
        finish=resize.finish,
    )
    write_json(folder / CONFIG_FILE, {name: value for name, value in resize.config.items() if name not in LEFT_BEHIND})
    copy_side_files(checkpoint.folder, folder)
