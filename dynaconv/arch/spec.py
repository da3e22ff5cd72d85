"""Architectures as data: every tensor's name and the named axes it spans.

A family file lists :class:`TensorSpec` rows. Each dimension of a tensor is an axis, or a product of axes in memory
order: the rows of a query projection are ``"q_head*head_dim"``. Everything that checks, cuts or resizes a checkpoint
works on axes and never on tensor names, so a new architecture is one more table.

Axes: ``vocab`` V, ``residual`` D (the residual stream), ``ffn`` F, ``q_head``, ``kv_head``, ``head_dim``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from dynaconv.errors import CheckpointError

AXES = ("vocab", "residual", "ffn", "q_head", "kv_head", "head_dim")
PARTS = ("embedding", "attention", "ffn", "norm", "head")


@dataclass(frozen=True)
class Size:
    """Where ``config.json`` says how long an axis is.

    Attributes:
        field: The field of ``config.json``.
        otherwise: What holds when the field is absent or null: a number, another axis, or a quotient of two axes such
            as ``"residual/q_head"``. ``None`` makes the field required.
    """

    field: str
    otherwise: int | str | None = None


@dataclass(frozen=True)
class TensorSpec:
    """One row of a family's table.

    Attributes:
        name: Tensor name, with ``{layer}`` where there is one in every decoder layer.
        axes: One entry a dimension: an axis, or several joined by ``*``, the slowest first.
        part: What the tensor belongs to, one of :data:`PARTS`.
        when: Field of ``config.json`` that must be true for the tensor to exist; ``None`` means always.
    """

    name: str
    axes: tuple[str, ...]
    part: str
    when: str | None = None

    @property
    def factors(self) -> tuple[tuple[str, ...], ...]:
        """The axes of each dimension: ``("q_head*head_dim", "residual")`` gives two and one."""
        return tuple(tuple(dimension.split("*")) for dimension in self.axes)


@dataclass(frozen=True)
class FFNSpec:
    """Where the feed-forward networks are and what their projections are called.

    Field for field what ``dynaconv.dynamic.layout.FFNLayout`` writes into ``dynaconv.json``. That one ships with every
    model and may import nothing of ours, so the two cannot be one class; carve makes the one from the other.

    Attributes:
        path: Module path with ``{layer}``.
        gate: Name of the gate projection; ``None`` where the FFN has no gate.
        up: Name of the up projection (the first, where there is no gate).
        down: Name of the down projection.
        activation: Field of ``config.json`` that names the activation.
    """

    path: str
    gate: str | None
    up: str
    down: str
    activation: str


@dataclass(frozen=True)
class Slot:
    """One tensor that a checkpoint of known sizes must hold.

    Attributes:
        name: Full tensor name.
        layer: Decoder layer it belongs to, ``None`` outside the layers.
        spec: The row it comes from.
        shape: Expected shape.
    """

    name: str
    layer: int | None
    spec: TensorSpec
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: ``model_type`` of ``config.json``.
        architectures: Class names that ``config.json`` may give; other heads (classifiers) are not language models.
        sizes: Where ``config.json`` says how long each axis is.
        tensors: Every tensor.
        ffn: Where the feed-forward networks are.
        layers: Field of ``config.json`` that counts the decoder layers.
        positions: Field of ``config.json`` with the longest sequence.
        tie: Field of ``config.json`` that ties the head to the embedding.
        ties: Tied tensor -> the tensor that is stored for both.
        ignored: Glob patterns of tensors that old checkpoints carry and no model reads.
    """

    model_type: str
    architectures: tuple[str, ...]
    sizes: Mapping[str, Size]
    tensors: tuple[TensorSpec, ...]
    ffn: FFNSpec
    layers: str = "num_hidden_layers"
    positions: str = "max_position_embeddings"
    tie: str = "tie_word_embeddings"
    ties: Mapping[str, str] = field(default_factory=lambda: {"lm_head.weight": "model.embed_tokens.weight"})
    ignored: tuple[str, ...] = ()

    def tied(self, config: Mapping[str, Any]) -> bool:
        """Whether ``config`` ties the head to the embedding."""
        return bool(config.get(self.tie))

    def layer_count(self, config: Mapping[str, Any]) -> int:
        """Number of decoder layers, L.

        Raises:
            CheckpointError: ``config`` does not say.
        """
        return _positive(self.layers, config.get(self.layers))

    def sizes_of(self, config: Mapping[str, Any]) -> dict[str, int]:
        """Length of every axis.

        Raises:
            CheckpointError: ``config`` lacks sizes, or they do not fit each other. Names all of them.
        """
        sizes: dict[str, int] = {}
        problems: list[str] = []
        for axis, size in self.sizes.items():
            try:
                sizes[axis] = _size(size, config, sizes)
            except CheckpointError as error:
                problems.append(error.what)
            except KeyError:  # a fallback on an axis that has already been reported
                continue
        if problems:
            raise CheckpointError("config.json does not describe the model: " + "; ".join(problems))
        return sizes

    def slots(self, config: Mapping[str, Any]) -> dict[str, Slot]:
        """Every tensor that a checkpoint with ``config`` must hold, by name, tied ones left out.

        Raises:
            CheckpointError: As :meth:`sizes_of` and :meth:`layer_count`.
        """
        sizes, layers = self.sizes_of(config), self.layer_count(config)
        absent = self.ties if self.tied(config) else {}
        found: dict[str, Slot] = {}
        for spec in self.tensors:
            if spec.name in absent or (spec.when is not None and not config.get(spec.when)):
                continue
            shape = tuple(prod(sizes[axis] for axis in factors) for factors in spec.factors)
            for layer in range(layers) if "{layer}" in spec.name else (None,):
                name = spec.name.format(layer=layer)
                found[name] = Slot(name, layer, spec, shape)
        return found


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{name} must be a whole number of at least 1, found {value!r}")
    return value


def _size(size: Size, config: Mapping[str, Any], known: Mapping[str, int]) -> int:
    value = config.get(size.field)
    if value is not None or size.otherwise is None:
        return _positive(size.field, value)
    if isinstance(size.otherwise, int):
        return size.otherwise
    axis, _, divisor = size.otherwise.partition("/")
    whole, parts = known[axis], known[divisor] if divisor else 1
    if whole % parts:
        raise CheckpointError(f"{size.field} is absent and {axis} {whole} is not a multiple of {divisor} {parts}")
    return whole // parts
