"""The only weight editor: edits speak of axes, and reach every dimension of every tensor that spans them.

Tensors stream one at a time from a checkpoint into a new one. Those that no edit reorders by rows go in pieces, so
the peak is the largest reordered tensor and two pieces, whatever the size of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.arch.dimension import Dimension
from dynaconv.arch.spec import AXES, Slot
from dynaconv.artifacts.tensors import CheckpointWriter, TensorInfo
from dynaconv.errors import CheckpointError, suggest

PIECE_BYTES = 8 * 1024**2
WIDENED = 8  # bytes an element of a piece takes while it is multiplied and noise is drawn for it, both in float32

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # what numpy takes for any type of that width

Selection = tuple[Tensor | None, ...]
Factor = float | Tensor | Mapping[int, float | Tensor]
Rewrite = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Take:
    """Keeps positions of an axis, in the order given: a permutation, a subset or a repetition, if need be scaled.

    Position j of the result is old position ``index[j]``, times a factor that depends on what the axis does there:
    ``contracted[j]`` where it is summed over with activations, ``produced[j]`` everywhere else.

    Attributes:
        axis: A named axis.
        index: Positions (n,) int64: one tensor for the whole network, or one for each (old) decoder layer.
        produced: A number or (n,) floats, or those by layer.
        contracted: A number or (n,) floats, or those by layer.
    """

    axis: str
    index: Tensor | Mapping[int, Tensor]
    produced: Factor = 1.0
    contracted: Factor = 1.0

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
        return self.index[self._inside(layer)]

    def factor(self, layer: int | None, *, contracted: bool) -> Tensor:
        """The factors (n,) float32 in ``layer``.

        Raises:
            KeyError: As :meth:`at`.
        """
        factor = self.contracted if contracted else self.produced
        if isinstance(factor, Mapping):
            factor = factor[self._inside(layer)]
        return torch.as_tensor(factor, dtype=torch.float32).expand(len(self.at(layer)))

    def _inside(self, layer: int | None) -> int:
        if layer is None:
            raise KeyError(f"tensors outside the layers span {self.axis!r}: its positions cannot differ by layer")
        return layer


@dataclass(frozen=True)
class Piece:
    """Rows of one tensor of the result, when all takes are done.

    Attributes:
        slot: The tensor of the result.
        source: The tensor it is made from.
        positions: Old positions (n,) along each whole dimension; ``None`` where nothing changes.
        start: First row, in the result.
        tensor: The rows, in the stored dtype or float32; whoever finishes them may work in place.
    """

    slot: Slot
    source: Slot
    positions: Selection
    start: int
    tensor: Tensor


Finish = Callable[[Piece], Tensor]


@dataclass(frozen=True)
class _Edit:
    """All that takes do to one tensor: per dimension the old positions and the factors, ``None`` where nothing."""

    positions: Selection
    factors: Selection

    @cached_property
    def scale(self) -> float:
        """The product of those factors that are the same at every position."""
        found = 1.0
        for factor in self.factors:
            if factor is not None and _constant(factor):
                found *= float(factor[0])
        return found

    @cached_property
    def varying(self) -> list[tuple[int, Tensor]]:
        """Dimension and values of those factors that are not."""
        return [(i, factor) for i, factor in enumerate(self.factors) if factor is not None and not _constant(factor)]


def selection(slot: Slot, sizes: Mapping[str, int], takes: Sequence[Take]) -> Selection:
    """Positions that ``takes`` leave along each dimension of ``slot``, ``None`` where nothing changes.

    A dimension of several axes is unfolded, taken from along each of them, and folded again, so that taking a head
    keeps its channels together.
    """
    return tuple(_positions(dimension, slot.layer, sizes, takes) for dimension in slot.spec.dimensions)


def _positions(
    dimension: Dimension, layer: int | None, sizes: Mapping[str, int], takes: Sequence[Take]
) -> Tensor | None:
    touching = [take for take in takes if take.axis in dimension.axes]
    if not touching:
        return None

    def index(axis: str) -> Tensor | None:
        chosen: Tensor | None = None
        for take in touching:
            if take.axis == axis:
                chosen = take.at(layer) if chosen is None else chosen[take.at(layer)]
        return chosen

    return dimension.positions(sizes, index)


def _factors(slot: Slot, number: int, sizes: Mapping[str, int], takes: Sequence[Take]) -> Tensor | None:
    """What every position of dimension ``number`` is multiplied with; ``None`` when that is 1 everywhere."""
    dimension, contracted = slot.spec.dimensions[number], slot.spec.contracts == number

    def value(axis: str) -> Tensor:
        found = torch.ones(sizes[axis])
        for take in takes:
            if take.axis == axis:
                found = found[take.at(slot.layer)] * take.factor(slot.layer, contracted=contracted)
        return found

    if not any(take.axis in dimension.axes for take in takes):
        return None
    factors = dimension.spread(value)
    return None if bool((factors == 1).all()) else factors


def _edit(slot: Slot, sizes: Mapping[str, int], takes: Sequence[Take]) -> _Edit:
    factors = tuple(_factors(slot, number, sizes, takes) for number in range(len(slot.spec.axes)))
    return _Edit(selection(slot, sizes, takes), factors)


def _constant(factor: Tensor) -> bool:
    return bool((factor == factor[0]).all())


def apply(slot: Slot, sizes: Mapping[str, int], tensor: Tensor, takes: Sequence[Take]) -> Tensor:
    """``tensor`` (of ``slot``'s shape) after ``takes``."""
    edit = _edit(slot, sizes, takes)
    return _scaled(slot, _take(tensor, edit.positions), edit, 0).to(tensor.dtype)


def _take(tensor: Tensor, selected: Selection) -> Tensor:
    for dimension, positions in enumerate(selected):
        if positions is not None:
            tensor = _columns(tensor, positions) if dimension == 1 == tensor.dim() - 1 else tensor[positions]
    return tensor


def _columns(tensor: Tensor, positions: Tensor) -> Tensor:
    """Columns of a matrix. numpy moves them four times as fast as torch does where an element has two bytes."""
    plain = tensor.contiguous().view(WORDS[tensor.dtype.itemsize]).numpy()
    return torch.from_numpy(plain.take(positions.numpy(), axis=1)).view(tensor.dtype)


def _scaled(slot: Slot, rows: Tensor, edit: _Edit, start: int) -> Tensor:
    """``rows`` (from row ``start`` of the result) times the factors; rounded to the stored dtype at most once."""
    scale, varying, offset = edit.scale, edit.varying, slot.spec.offset
    if not varying and not offset:
        return rows if scale == 1 else rows * scale
    if not varying and scale == 1:
        return rows
    scaled = rows.float() + offset
    for dimension, factor in varying:
        part = factor[start : start + len(rows)] if dimension == 0 else factor
        scaled *= part.view([-1 if i == dimension else 1 for i in range(rows.dim())])
    return scaled.mul_(scale).sub_(offset)


def transform(
    checkpoint: Checkpoint,
    takes: Sequence[Take],
    folder: Path,
    *,
    shard_bytes: int,
    advance: Callable[[TensorInfo], None] | None = None,
    config: Mapping[str, Any] | None = None,
    layers: Sequence[int] | None = None,
    rewrite: Callable[[Slot], Rewrite | None] | None = None,
    finish: Finish | None = None,
) -> None:
    """Writes ``checkpoint``'s weights after ``takes`` into ``folder``, as one safetensors file or shards.

    Tensor names and dtypes stay, and their order. A stored copy of a tied tensor is left out, and so are leftovers that
    no model reads.

    Args:
        checkpoint: Where from.
        takes: The edits, in order.
        folder: Where to.
        shard_bytes: Largest shard.
        advance: Called with each tensor that was read once what it gives is written.
        config: Content of the result's ``config.json``, where that is another.
        layers: Old decoder layer that each new one is made from; as they are unless given.
        rewrite: Gives, for a tensor of ``checkpoint``, what to do to it as a whole before the takes, or ``None``.
        finish: What to do to each piece of the result after the takes. Tensors that are contracted along their rows
            come as one piece.

    Raises:
        CheckpointError: A tensor holds NaN or infinity, a stored copy of a tied tensor differs from it, or the result
            has not the shape that ``config`` says.
        ArtifactError: The disk is full, read-only or not accessible.
    """
    _check_ties(checkpoint)
    made = _made_from(checkpoint, checkpoint.config if config is None else config, layers)
    edits = {name: _edit(slot, checkpoint.sizes, takes) for name, slot in checkpoint.slots.items() if name in made}
    infos = checkpoint.reader.tensors
    layout = []
    for name, slots in made.items():
        shape = _shape(infos[name], edits[name].positions)
        layout += [(slot.name, infos[name].dtype, _checked(slot, shape)) for slot in slots]
    with CheckpointWriter(folder, layout, shard_bytes=shard_bytes) as writer:
        for name, slots in made.items():
            _write(checkpoint, checkpoint.slots[name], slots, edits[name], writer, rewrite=rewrite, finish=finish)
            if advance is not None:
                advance(infos[name])


def _made_from(
    checkpoint: Checkpoint, config: Mapping[str, Any], layers: Sequence[int] | None
) -> dict[str, list[Slot]]:
    """The tensors of the result by the name of the tensor they are made from, in the order of the files."""
    made: dict[str, list[Slot]] = {name: [] for name in checkpoint.slots}
    for slot in checkpoint.family.slots(config).values():
        layer = slot.layer if slot.layer is None or layers is None else layers[slot.layer]
        made[slot.spec.name.format(layer=layer)].append(slot)
    return {name: slots for name, slots in made.items() if slots}


def _shape(info: TensorInfo, selected: Selection) -> tuple[int, ...]:
    return tuple(size if chosen is None else len(chosen) for size, chosen in zip(info.shape, selected, strict=True))


def _checked(slot: Slot, shape: tuple[int, ...]) -> tuple[int, ...]:
    if shape != slot.shape:
        raise CheckpointError(f"{slot.name} would get another shape", expected=list(slot.shape), found=list(shape))
    return shape


def _write(
    checkpoint: Checkpoint,
    source: Slot,
    slots: Sequence[Slot],
    edit: _Edit,
    writer: CheckpointWriter,
    *,
    rewrite: Callable[[Slot], Rewrite | None] | None,
    finish: Finish | None,
) -> None:
    """All tensors of the result that are made from ``source``; nothing of it stays in memory."""
    dtype = checkpoint.reader.tensors[source.name].dtype
    whole = _whole(checkpoint, source, edit, rewrite)
    for slot in slots:
        for piece in _pieces(checkpoint, source, slot, edit, whole):
            tensor = piece.tensor if finish is None else finish(piece)
            writer.write_rows(slot.name, piece.start, tensor.to(dtype))


def _whole(
    checkpoint: Checkpoint, source: Slot, edit: _Edit, rewrite: Callable[[Slot], Rewrite | None] | None
) -> Tensor | None:
    """A tensor to be edited as a whole, because its rows change places or all of it is needed; else ``None``."""
    rewritten = rewrite(source) if rewrite is not None else None
    if rewritten is None and source.spec.contracts != 0 and edit.positions[0] is None:
        return None
    tensor = checkpoint.reader.read_finite(source.name)
    return tensor if rewritten is None else rewritten(tensor)


def _pieces(checkpoint: Checkpoint, source: Slot, slot: Slot, edit: _Edit, whole: Tensor | None) -> Iterator[Piece]:
    """A tensor of the result by pieces of its rows, read piece by piece where the old one is not there ``whole``."""
    reader, info, rows = checkpoint.reader, checkpoint.reader.tensors[source.name], edit.positions[0]
    count = slot.shape[0]
    step = count if source.spec.contracts == 0 else _piece_rows(info, slot.shape)
    for start in range(0, count, step):
        stop = min(start + step, count)
        if whole is None:
            piece = reader.read_finite(info.name, (start, stop))
        else:
            piece = whole[start:stop].clone() if rows is None else whole.index_select(0, rows[start:stop])
        taken = _take(piece, (None, *edit.positions[1:]))
        yield Piece(slot, source, edit.positions, start, _scaled(slot, taken, edit, start))


def _piece_rows(info: TensorInfo, shape: Sequence[int]) -> int:
    """Rows of a piece: neither the old ones nor the new ones take more than :data:`PIECE_BYTES`."""
    old = info.nbytes // max(1, info.shape[0])
    new = info.dtype.itemsize * torch.Size(shape[1:]).numel()
    return max(1, PIECE_BYTES // max(1, old, new))


def _check_ties(checkpoint: Checkpoint) -> None:
    """A tied checkpoint may store the tensor twice; transformers unties copies that differ, so they must not."""
    reader = checkpoint.reader
    for copy, kept in checkpoint.family.ties.items() if checkpoint.tied else ():
        if copy not in reader.tensors:
            continue
        info, other = reader.tensors[copy], reader.tensors[kept]
        step = _piece_rows(info, info.shape)
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


def transform_peak_bytes(checkpoint: Checkpoint, axes: Collection[str], result: Checkpoint | None = None) -> int:
    """Largest memory that :func:`transform` holds at once when it takes from ``axes``, in bytes.

    Args:
        checkpoint: The source.
        axes: Axes that are taken from.
        result: The shape of the result where it differs; factors and what finishes pieces may then widen them.
    """
    peak = 0
    grown = {} if result is None else {slot.spec.name: slot for slot in result.slots.values()}
    for name, slot in checkpoint.slots.items():
        info = checkpoint.reader.tensors[name]
        piece = min(info.nbytes, PIECE_BYTES)
        by_rows, *rest = (not dimension.axes.isdisjoint(axes) for dimension in slot.spec.dimensions)
        needed = (info.nbytes if by_rows else piece) + (piece if by_rows or any(rest) else 0)
        if slot.spec.name in grown:
            new = info.dtype.itemsize * torch.Size(grown[slot.spec.name].shape).numel()
            at_once = new if slot.spec.contracts == 0 else min(new, PIECE_BYTES)
            needed += at_once * (1 + WIDENED // info.dtype.itemsize)
        peak = max(peak, needed)
    return peak
