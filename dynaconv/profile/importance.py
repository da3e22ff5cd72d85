"""What a resize to a smaller shape has to know: how much each neuron, head, residual channel and layer matters.

One pass over the calibration text, layer by layer. Scores follow weight subcloning (arXiv 2312.09299): the mean
|activation| over tokens. For neurons and attention channels it is multiplied by the norm of the column that the output
projection has for them (ours, as profile does for neurons), since that decides how much of it reaches the residual
stream. The residual stream has one score for the whole network, the sum over all places that it is read from.

Left in a folder as ``importance.json`` and ``importance.safetensors``: ``residual`` (D,) for the network, and for each
layer ``layers.{l}.<what>`` as :func:`layer_importance` returns them.

M tokens, B batch, T tokens in a window, D residual width, F FFN width, L layers, Q query heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.arch.dimension import Dimension
from dynaconv.arch.spec import TensorSpec
from dynaconv.artifacts.files import write_json
from dynaconv.artifacts.writer import CheckpointWriter, TensorLayout
from dynaconv.data.windows import Batch
from dynaconv.errors import CheckpointError
from dynaconv.profile.accumulators import ActivationMean, Influence, SecondMoment
from dynaconv.profile.capture import Captured, capture
from dynaconv.profile.streaming import LayerStream

SCHEMA = 1
SUMMARY_FILE = "importance.json"
PREFIX = "importance"  # of importance.safetensors
ONE_FILE = 2**62  # bytes: more than any file
WEIGHT = ".weight"
SCORE_AXES = ("q_dim", "k_dim")
MOMENTS = {"attention": "attention_moments", "ffn": "neuron_moments"}


@dataclass(frozen=True)
class ImportanceSummary:
    """Content of ``importance.json``. Holds no times: the same inputs give the same bytes.

    Attributes:
        model_type: Family of the checkpoint.
        sizes: Length of every axis.
        layers: L.
        tokens: Calibration tokens, padding left out.
        loss: The parent's, nats a token on the calibration text.
        influence: 1 - mean cosine of input and output, of each layer.
        second_moments: Whether those of the output projections' inputs were gathered.
        dtype: What it was computed in.
        data: Digest of the calibration text.
        seed: What drew the windows.
    """

    model_type: str
    sizes: dict[str, int]
    layers: int
    tokens: int
    loss: float
    influence: tuple[float, ...]
    second_moments: bool
    dtype: str
    data: str
    seed: int


def measure_importance(
    stream: LayerStream,
    batches: Sequence[Batch],
    folder: Path,
    *,
    second_moments: bool = False,
    data: str = "",
    seed: int = 0,
    finished: Callable[[int, Batch], None] = lambda layer, batch: None,
) -> ImportanceSummary:
    """Measures the model on ``batches`` and writes what it found into ``folder``, layer by layer.

    Args:
        stream: The model.
        batches: Calibration text.
        folder: Where to.
        second_moments: Whether to gather what a least-squares refit needs: large, (F, F) and (Q d, Q d) a layer.
        data: Digest of the calibration text, for the record.
        seed: What drew the windows, for the record.
        finished: Called after each batch of each layer with the layer's number.

    Raises:
        CheckpointError: A weight is NaN or infinite; the message names the tensor.
        ArtifactError: The folder cannot be written.
    """
    checkpoint, influence = stream.checkpoint, []
    residual = ActivationMean(checkpoint.sizes["residual"], stream.device)
    layout = tensor_layout(checkpoint, second_moments=second_moments)
    with CheckpointWriter(folder, layout, shard_bytes=ONE_FILE, prefix=PREFIX) as writer:
        hidden = stream.embed(batches)
        for states, batch in zip(hidden, batches, strict=True):
            residual.add(tokens_of(states, _real(batch, states.device)))
        for index in range(checkpoint.layers):
            measured = layer_importance(
                stream,
                index,
                hidden,
                batches,
                residual,
                second_moments=second_moments,
                finished=lambda batch, layer=index: finished(layer, batch),  # type: ignore[misc]
            )
            influence.append(float(measured["influence"]))
            for name in list(measured):  # second moments are large: each goes before the next is written
                writer.write(f"layers.{index}.{name}", measured.pop(name))
        writer.write("residual", residual.mean().cpu())
        summary = ImportanceSummary(
            model_type=checkpoint.family.model_type,
            sizes=dict(checkpoint.sizes),
            layers=checkpoint.layers,
            tokens=residual.tokens // (checkpoint.layers + 1),
            loss=stream.loss(hidden, batches),
            influence=tuple(influence),
            second_moments=second_moments,
            dtype=str(stream.dtype).removeprefix("torch."),
            data=data,
            seed=seed,
        )
    write_json(folder / SUMMARY_FILE, {"schema": SCHEMA, **asdict(summary)})
    return summary


def tensor_layout(checkpoint: Checkpoint, *, second_moments: bool) -> list[TensorLayout]:
    """Name, dtype and shape of every tensor of ``importance.safetensors``."""
    sizes, widths = checkpoint.sizes, output_widths(checkpoint)
    heads = sizes["q_head"], sizes["v_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "neuron_activation": (sizes["ffn"],),
        "neuron_importance": (sizes["ffn"],),
        "attention_activation": heads,
        "attention_importance": heads,
        "query_key_activation": (sizes["q_dim"],),
        "influence": (),
        "contribution": (),
    }
    if second_moments:
        shapes |= {MOMENTS[part]: (width, width) for part, width in widths.items()}
    named = {f"layers.{i}.{name}": shape for i in range(checkpoint.layers) for name, shape in shapes.items()}
    return [(name, torch.float32, shape) for name, shape in {"residual": (sizes["residual"],), **named}.items()]


@dataclass(frozen=True)
class Points:
    """Where activations of a layer are captured, as rows of the family's table.

    Attributes:
        outputs: The projections that write into the residual stream, by part: ``attention`` contracts all value
            channels, ``ffn`` the neurons.
        scores: The projections that make queries or keys.
    """

    outputs: dict[str, TensorSpec]
    scores: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Points:
        """Found by what they contract and produce.

        Raises:
            CheckpointError: The family's table does not hold exactly one output projection of each part.
        """
        outputs = {
            part: _contracting(checkpoint, part, axis) for part, axis in (("attention", "v_dim"), ("ffn", "ffn"))
        }
        scores = [spec for spec in checkpoint.family.tensors if spec.contracts is not None]
        return cls(outputs, tuple(s for s in scores if not produced(s).axes.isdisjoint(SCORE_AXES)))

    def captured(self, layer: nn.Module) -> AbstractContextManager[Captured]:
        """Captures, by part, what goes into the output projections of ``layer``; by name, what scores are made of."""
        return capture(
            inputs={part: module_of(layer, spec) for part, spec in self.outputs.items()},
            outputs={spec.name: module_of(layer, spec) for spec in self.scores},
        )


class _LayerSums:
    """What is gathered of one layer."""

    def __init__(self, stream: LayerStream, points: Points, *, second_moments: bool) -> None:
        checkpoint, device = stream.checkpoint, stream.device
        widths = output_widths(checkpoint)
        self.inputs = {part: ActivationMean(width, device) for part, width in widths.items()}
        rows = {spec.name: produced(spec).size(checkpoint.sizes) for spec in points.scores}
        self.made = {name: ActivationMean(count, device) for name, count in rows.items()}
        self.influence = Influence(device)
        self.moments = {part: SecondMoment(width, device) for part, width in widths.items() if second_moments}

    def add(self, captured: Captured, before: Tensor, after: Tensor, real: Tensor | None) -> None:
        """Gathers a batch: what passed the points, and the residual stream on both sides of the layer."""
        for part, tensor in captured.inputs.items():
            rows = tokens_of(tensor, real)
            self.inputs[part].add(rows)
            if part in self.moments:
                self.moments[part].add(rows)
        for name, tensor in captured.outputs.items():
            self.made[name].add(tokens_of(tensor, real))
        self.influence.add(tokens_of(before, real), tokens_of(after, real))


def output_widths(checkpoint: Checkpoint) -> dict[str, int]:
    """How many inputs the output projections have: ``attention`` Q d, ``ffn`` F."""
    sizes = checkpoint.sizes
    return {"attention": sizes["q_head"] * sizes["v_dim"], "ffn": sizes["ffn"]}


def layer_importance(
    stream: LayerStream,
    index: int,
    hidden: list[Tensor],
    batches: Sequence[Batch],
    residual: ActivationMean,
    *,
    second_moments: bool = False,
    finished: Callable[[Batch], None] = lambda batch: None,
) -> dict[str, Tensor]:
    """Measures decoder layer ``index`` and moves the hidden states behind it.

    Args:
        stream: The model.
        index: Which layer.
        hidden: For each batch, the layer's input (B, T, D); replaced by its output.
        batches: Calibration text.
        residual: Gathers |layer's output|; one for the network, the embedding first.
        second_moments: Whether to gather those of the output projections' inputs.
        finished: Called after each batch.

    Returns:
        Float32, on the CPU. ``neuron_activation`` (F,) mean |h|, ``neuron_importance`` (F,) that times the norm of
        the down column; ``attention_activation`` and ``attention_importance`` (Q, d), the same of what goes into the
        attention's output projection; ``query_key_activation`` (d,) mean |q_c| times mean |k_c|; ``influence`` () 1 -
        mean cosine of the layer's input and output; ``contribution`` () mean ||f(x)|| / ||x + f(x)||. With
        ``second_moments`` also ``neuron_moments`` (F, F) and ``attention_moments`` (Q d, Q d), means over tokens of
        x x^T.
    """
    checkpoint, points = stream.checkpoint, Points.of(stream.checkpoint)
    sums = _LayerSums(stream, points, second_moments=second_moments)
    with stream.layer(index) as layer, points.captured(layer) as captured:
        for i, batch in enumerate(batches):
            before, real = hidden[i], _real(batch, stream.device)
            hidden[i] = stream.advance(index, layer, before, batch)
            sums.add(captured, before, hidden[i], real)
            residual.add(tokens_of(hidden[i], real))
            captured.clear()
            finished(batch)
        columns = {part: column_norms(layer, spec) for part, spec in points.outputs.items()}
    heads = checkpoint.sizes["q_head"], checkpoint.sizes["v_dim"]
    means = {part: gathered.mean() for part, gathered in sums.inputs.items()}
    made = {name: gathered.mean().cpu() for name, gathered in sums.made.items()}
    measured = {
        "neuron_activation": means["ffn"],
        "neuron_importance": means["ffn"] * columns["ffn"],
        "attention_activation": means["attention"].view(heads),
        "attention_importance": (means["attention"] * columns["attention"]).view(heads),
        "query_key_activation": query_key_activation(checkpoint, points, made),
        "influence": sums.influence.block_influence(),
        "contribution": sums.influence.contribution(),
    }
    for part, moment in sums.moments.items():
        measured[MOMENTS[part]] = moment.sums["gram"].div_(max(1, moment.tokens))
    return {name: tensor.cpu() for name, tensor in measured.items()}


def query_key_activation(checkpoint: Checkpoint, points: Points, made: Mapping[str, Tensor]) -> Tensor:
    """Mean |activation| of each channel of the queries, times that of the keys, heads added up: (d,) float32."""
    sizes = checkpoint.sizes
    totals = {axis: torch.zeros(sizes[axis]) for axis in SCORE_AXES}
    for spec in points.scores:
        for axis in produced(spec).axes & totals.keys():
            none = dict.fromkeys({*SCORE_AXES, "v_dim"} - {axis}, torch.tensor([], dtype=torch.int64))
            rows = produced(spec).positions(sizes, none.get)  # of this axis only, its channels fastest
            totals[axis] += made[spec.name][rows].view(-1, sizes[axis]).sum(0)
    return totals["q_dim"] * totals["k_dim"]


def produced(spec: TensorSpec) -> Dimension:
    """The dimension of a weight matrix along which its outputs are."""
    assert spec.contracts is not None
    return spec.dimensions[1 - spec.contracts]


def module_of(layer: nn.Module, spec: TensorSpec) -> nn.Module:
    """The module of a decoder layer that holds the tensor ``spec``."""
    return layer.get_submodule(spec.name.partition("{layer}.")[2].removesuffix(WEIGHT))


def column_norms(layer: nn.Module, spec: TensorSpec) -> Tensor:
    """L2 norm of what each input of the projection ``spec`` is multiplied with: (inputs,) float32."""
    assert spec.contracts is not None
    weight = module_of(layer, spec).get_parameter("weight")
    others = [dimension for dimension in range(weight.dim()) if dimension != spec.contracts]
    return torch.linalg.vector_norm(weight, dim=others, dtype=torch.float32)


def tokens_of(tensor: Tensor, real: Tensor | None) -> Tensor:
    """The rows (M, width) of ``tensor`` (B, T, width, or those two flattened) that are not padding."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if real is None else rows[real.flatten()]


def _real(batch: Batch, device: torch.device) -> Tensor | None:
    return None if batch.attention_mask is None else batch.attention_mask.to(device)


def _contracting(checkpoint: Checkpoint, part: str, axis: str) -> TensorSpec:
    """The one weight of ``part`` that is summed over ``axis``."""
    found = [
        spec
        for spec in checkpoint.family.tensors
        if spec.part == part and spec.contracts is not None and axis in spec.axes[spec.contracts]
    ]
    if len(found) != 1:
        names = ", ".join(spec.name for spec in found) or "none"
        expected = f"one {part} weight that contracts {axis}"
        raise CheckpointError(f"the {checkpoint.family.model_type} table is ambiguous", expected=expected, found=names)
    return found[0]
