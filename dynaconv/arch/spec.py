"""Architectures as data: every tensor's name and the named axes it spans.

A family file lists :class:`TensorSpec` rows. Each dimension of a tensor is an axis, or an expression of axes
(:mod:`dynaconv.arch.dimension`): the rows of a query projection are ``"q_head*q_dim"``. Everything that checks, cuts or
resizes a checkpoint works on axes and never on tensor names, so a new architecture is one more table.

Axes: ``vocab`` V, ``position`` (learned positions), ``residual`` D (the residual stream), ``ffn`` F, ``q_head`` and
``kv_head`` (without grouped queries, keys and values span ``q_head`` too), and the channels of a head: ``q_dim``,
``k_dim`` and ``v_dim``. Those three are equally long, but queries meet keys channel by channel while values go their
own way, so they are cut and grown apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dynaconv.arch.dimension import Dimension, dimension
from dynaconv.errors import CheckpointError

AXES = ("vocab", "position", "residual", "ffn", "q_head", "kv_head", "q_dim", "k_dim", "v_dim")
PARTS = ("embedding", "position", "attention", "ffn", "norm", "head")
LAYER_TYPES = "layer_types"  # the field of config.json that says which layers attend within a sliding window


@dataclass(frozen=True)
class Size:
    """Where ``config.json`` says how long an axis is.

    Attributes:
        field: The field of ``config.json``; ``None`` where the length always follows from ``otherwise``.
        otherwise: What holds when the field is absent or null: a number, another axis, a quotient of two axes such as
            ``"residual/q_head"``, or a multiple of one such as ``"4*residual"``. ``None`` makes the field required.
        plus: Positions beyond those that the field counts.
    """

    field: str | None
    otherwise: int | str | None = None
    plus: int = 0


@dataclass(frozen=True)
class TensorSpec:
    """One row of a family's table.

    Attributes:
        name: Tensor name, with ``{layer}`` where there is one in every decoder layer.
        axes: One entry a dimension: an axis, or an expression of several.
        part: What the tensor belongs to, one of :data:`PARTS`.
        when: Field of ``config.json`` that must be true for the tensor to exist; ``None`` means always.
        contracts: The dimension that is summed over with the activations: 1 for an ``nn.Linear`` weight, 0 for a
            ``Conv1D`` one. ``None`` for what is looked up, added or multiplied with. All other dimensions are produced.
        closes: Whether a branch adds nothing to the residual stream once its tensors of this kind have no effect.
        offset: The tensor acts as ``offset`` + what is stored; 1 for norms that multiply with 1 + w.
    """

    name: str
    axes: tuple[str, ...]
    part: str
    when: str | None = None
    contracts: int | None = None
    closes: bool = False
    offset: float = 0.0

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Its dimensions, read."""
        return tuple(dimension(text) for text in self.axes)


@dataclass(frozen=True)
class FFNSpec:
    """Where the feed-forward networks are and what their projections are called.

    Field for field what ``dynaconv.dynamic.layout.FFNLayout`` writes into ``dynaconv.json``. That one ships with every
    model and may import nothing of ours, so the two cannot be one class; carve makes the one from the other.

    Attributes:
        path: Module path with ``{layer}``; that of the decoder layer where the projections lie in it directly.
        gate: Name of the gate projection; ``None`` where the FFN has no gate, the name of the up projection where both
            are stored as one, the gate's rows first.
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
        prefix: What names of old checkpoints lack at their beginning.
        defaults: What holds for fields that ``config.json`` leaves out, where that is not nothing.
        requires: Fields whose other values make another architecture, and the value that they must have.
        follows: Fields that must equal an axis.
        attention_scale: Field of ``config.json`` that fixes the scale of attention scores; ``None`` where it is
            1 / sqrt(length of a head).
        layer_scale: Field of ``config.json`` that, when true, makes a layer depend on its number.
        embedding_scaled: Whether embeddings are multiplied with sqrt(D).
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
    prefix: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    requires: Mapping[str, Any] = field(default_factory=dict)
    follows: Mapping[str, str] = field(default_factory=dict)
    attention_scale: str | None = None
    layer_scale: str | None = None
    embedding_scaled: bool = False

    def setting(self, config: Mapping[str, Any], name: str) -> Any:
        """The field ``name`` of ``config``, or what holds when it is left out; ``None`` when nothing does."""
        return config.get(name, self.defaults.get(name))

    def tied(self, config: Mapping[str, Any]) -> bool:
        """Whether ``config`` ties the head to the embedding."""
        return bool(self.setting(config, self.tie))

    def layer_count(self, config: Mapping[str, Any]) -> int:
        """Number of decoder layers, L.

        Raises:
            CheckpointError: ``config`` does not say.
        """
        return _positive(self.layers, config.get(self.layers))

    def sizes_of(self, config: Mapping[str, Any]) -> dict[str, int]:
        """Length of every axis.

        Raises:
            CheckpointError: ``config`` lacks sizes, they do not fit each other, or it is of an architecture that only
                shares the name. Names all of them.
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
        for name, expected in (
            *self.requires.items(),
            *((name, sizes.get(axis)) for name, axis in self.follows.items()),
        ):
            found = self.setting(config, name)
            if None not in (found, expected) and found != expected:
                problems.append(f"{name} is {found!r}, and only {expected!r} is supported for {self.model_type}")
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
            if spec.name in absent or (spec.when is not None and not self.setting(config, spec.when)):
                continue
            shape = tuple(each.size(sizes) for each in spec.dimensions)
            for layer in range(layers) if "{layer}" in spec.name else (None,):
                name = spec.name.format(layer=layer)
                found[name] = Slot(name, layer, spec, shape)
        return found

    def resized(self, config: Mapping[str, Any], sizes: Mapping[str, int], layers: Sequence[int]) -> dict[str, Any]:
        """``config`` with other sizes, and with the decoder layers ``layers`` (old numbers, in their new order).

        Raises:
            CheckpointError: The sizes do not fit each other; names all that do not.
        """
        made = dict(config)
        for axis, size in self.sizes.items():
            if size.field is not None:
                made[size.field] = sizes[axis] - size.plus
        made.update({name: sizes[axis] for name, axis in self.follows.items() if name in config})
        if list(layers) != list(range(self.layer_count(config))):
            types = _layer_types(config)
            if types is not None:
                made[LAYER_TYPES] = [types[layer] for layer in layers]
        made[self.layers] = len(layers)
        found = self.sizes_of(made)
        wrong = [
            f"{axis} would be {found[axis]} instead of {sizes[axis]}" for axis in found if found[axis] != sizes[axis]
        ]
        if wrong:
            raise CheckpointError(f"no {self.model_type} model has these sizes: " + "; ".join(wrong))
        return made


def _layer_types(config: Mapping[str, Any]) -> list[str] | None:
    """The kind of attention of every layer, as transformers reads it from ``config``; ``None`` where all are alike."""
    from transformers import AutoConfig

    types = getattr(AutoConfig.for_model(**config), LAYER_TYPES, None)
    return None if types is None else list(types)


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{name} must be a whole number of at least 1, found {value!r}")
    return value


def _size(size: Size, config: Mapping[str, Any], known: Mapping[str, int]) -> int:
    value = None if size.field is None else config.get(size.field)
    if size.field is not None and (value is not None or size.otherwise is None):
        return _positive(size.field, value) + size.plus
    if not isinstance(size.otherwise, str):
        return _positive(str(size.field), size.otherwise) + size.plus
    if "*" in size.otherwise:
        times, _, axis = size.otherwise.partition("*")
        return int(times) * known[axis]
    axis, _, divisor = size.otherwise.partition("/")
    whole, parts = known[axis], known[divisor] if divisor else 1
    if whole % parts:
        absent = f"{size.field} is absent and " if size.field else ""
        raise CheckpointError(f"{absent}{axis} {whole} is not a multiple of {divisor} {parts}")
    return whole // parts
