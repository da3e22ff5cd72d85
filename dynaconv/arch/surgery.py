"""The only weight editor: edits speak of axes, and reach every dimension of every tensor that spans them.

Tensors stream one at a time from a checkpoint into a new one. Those that no edit reorders by rows go in pieces, so
the peak is the largest reordered tensor and two pieces, whatever the size of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.arch.spec import AXES, Slot
from dynaconv.artifacts.tensors import CheckpointWriter, TensorInfo
from dynaconv.errors import CheckpointError, suggest

PIECE_BYTES = 8 * 1024**2

Selection = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Take:
    """Keeps positions of an axis, in the order given: a permutation, a subset or a repetition.

    Attributes:
        axis: A named axis.
        index: Positions (n,) int64: one tensor for the whole network, or one for each decoder layer.
    """

    axis: str
    index: Tensor | Mapping[int, Tensor]

    def __post_init__(self) -> None:
        if self.axis not in AXES:  # a misspelt axis would silently change nothing
            raise ValueError(f"no axis is called {self.axis!r}: {suggest(self.axis, AXES)}")

    def at(self, layer: int | None) -> Tensor:
        """The positions in ``layer``; ``None`` stands for tensors outside the layers.

        Raises:
            KeyError: The index is given by layer and has none for this one.
        """
        if isinstance(self.index, Tensor):
            return self.index
        if layer is None:
            raise KeyError(f"tensors outside the layers span {self.axis!r}: its positions cannot differ by layer")
        return self.index[layer]


def selection(slot: Slot, sizes: Mapping[str, int], takes: Sequence[Take]) -> Selection:
    """Positions that ``takes`` leave along each dimension of ``slot``, ``None`` where nothing changes.

    A dimension that is a product of axes is unfolded, taken from along each of them, and folded again, so that taking
    a head keeps its ``head_dim`` rows together.
    """
    return tuple(_positions(factors, slot.layer, sizes, takes) for factors in slot.spec.factors)


def _positions(
    factors: tuple[str, ...], layer: int | None, sizes: Mapping[str, int], takes: Sequence[Take]
) -> Tensor | None:
    touching = [take for take in takes if take.axis in factors]
    if not touching:
        return None
    lengths = [sizes[axis] for axis in factors]
    positions = torch.arange(prod(lengths)).view(lengths)
    for take in touching:
        positions = positions.index_select(factors.index(take.axis), take.at(layer))
    return positions.flatten()


def apply(slot: Slot, sizes: Mapping[str, int], tensor: Tensor, takes: Sequence[Take]) -> Tensor:
    """``tensor`` (of ``slot``'s shape) after ``takes``."""
    return _take(tensor, selection(slot, sizes, takes))


def _take(tensor: Tensor, selected: Selection) -> Tensor:
    for dimension, positions in enumerate(selected):
        if positions is not None:
            tensor = tensor.index_select(dimension, positions)
    return tensor


def transform(
    checkpoint: Checkpoint,
    takes: Sequence[Take],
    folder: Path,
    *,
    shard_bytes: int,
    advance: Callable[[TensorInfo], None] | None = None,
) -> None:
    """Writes ``checkpoint``'s weights after ``takes`` into ``folder``, as one safetensors file or shards.

    Tensor names, dtypes and order stay. A stored copy of a tied tensor is left out, and so are leftovers that no model
    reads.

    Args:
        checkpoint: Where from.
        takes: The edits, in order.
        folder: Where to.
        shard_bytes: Largest shard.
        advance: Called with each tensor once it is written.

    Raises:
        CheckpointError: A tensor holds NaN or infinity, or a stored copy of a tied tensor differs from it.
        ArtifactError: The disk is full, read-only or not accessible.
    """
    _check_ties(checkpoint)
    infos = checkpoint.reader.tensors
    selected = {name: selection(slot, checkpoint.sizes, takes) for name, slot in checkpoint.slots.items()}
    layout = [(name, infos[name].dtype, _shape(infos[name], chosen)) for name, chosen in selected.items()]
    with CheckpointWriter(folder, layout, shard_bytes=shard_bytes) as writer:
        for name, chosen in selected.items():
            _stream(checkpoint, infos[name], chosen, writer)
            if advance is not None:
                advance(infos[name])


def _shape(info: TensorInfo, selected: Selection) -> tuple[int, ...]:
    return tuple(size if chosen is None else len(chosen) for size, chosen in zip(info.shape, selected, strict=True))


def _stream(checkpoint: Checkpoint, info: TensorInfo, selected: Selection, writer: CheckpointWriter) -> None:
    """One tensor from reader to writer, by pieces of its rows; whole only where its rows change places."""
    reader, rows = checkpoint.reader, selected[0]
    whole = None if rows is None else reader.read_finite(info.name)
    count = info.shape[0] if rows is None else len(rows)
    step = _piece_rows(info)
    for start in range(0, count, step):
        stop = min(start + step, count)
        if whole is None or rows is None:
            piece = reader.read_finite(info.name, (start, stop))
        else:
            piece = whole.index_select(0, rows[start:stop])
        writer.write_rows(info.name, start, _take(piece, (None, *selected[1:])))


def _piece_rows(info: TensorInfo) -> int:
    return max(1, PIECE_BYTES // max(1, info.nbytes // max(1, info.shape[0])))


def _check_ties(checkpoint: Checkpoint) -> None:
    """A tied checkpoint may store the tensor twice; transformers unties copies that differ, so they must not."""
    reader = checkpoint.reader
    for copy, kept in checkpoint.family.ties.items() if checkpoint.tied else ():
        if copy not in reader.tensors:
            continue
        info, other = reader.tensors[copy], reader.tensors[kept]
        step = _piece_rows(info)
        same = info.shape == other.shape and all(
            torch.equal(reader.read_rows(copy, *rows), reader.read_rows(kept, *rows))
            for rows in ((start, min(start + step, info.shape[0])) for start in range(0, info.shape[0], step))
        )
        if not same:
            raise CheckpointError(
                f"config.json ties {copy} to {kept}, but the checkpoint stores both and they differ",
                where=info.file,
                hint=f"set {checkpoint.family.tie} to false in config.json if the head is the model's own",
            )


def transform_peak_bytes(checkpoint: Checkpoint, axes: Collection[str]) -> int:
    """Largest memory that :func:`transform` holds at once when it edits ``axes``, in bytes."""
    peak = 0
    for name, slot in checkpoint.slots.items():
        info = checkpoint.reader.tensors[name]
        piece = min(info.nbytes, PIECE_BYTES)
        by_rows, *rest = (any(axis in axes for axis in factors) for factors in slot.spec.factors)
        peak = max(peak, (info.nbytes if by_rows else piece) + (piece if by_rows or any(rest) else 0))
    return peak
