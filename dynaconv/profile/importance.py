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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.arch.spec import TensorSpec
from dynaconv.artifacts.files import write_json
from dynaconv.artifacts.writer import CheckpointWriter, TensorLayout
from dynaconv.data.windows import Batch
from dynaconv.errors import CheckpointError
from dynaconv.profile.accumulators import ActivationMean, Influence, SecondMoment
from dynaconv.profile.streaming import LayerStream

SCHEMA = 1
SUMMARY_FILE = "importance.json"
PREFIX = "importance"  # of importance.safetensors
ONE_FILE = 2**62  # bytes: more than any file
WEIGHT = ".weight"
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
        "influence": (),
        "contribution": (),
    }
    if second_moments:
        shapes |= {MOMENTS[part]: (width, width) for part, width in widths.items()}
    named = {f"layers.{i}.{name}": shape for i in range(checkpoint.layers) for name, shape in shapes.items()}
    return [(name, torch.float32, shape) for name, shape in {"residual": (sizes["residual"],), **named}.items()]


@dataclass(frozen=True)
class Outputs:
    """The two projections of a layer that write into the residual stream: their rows of the family's table.

    Attributes:
        attention: Contracts all value channels, ``q_head*v_dim``.
        ffn: Contracts the neurons, ``ffn``.
    """

    attention: TensorSpec
    ffn: TensorSpec

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Outputs:
        """Found by what they contract.

        Raises:
            CheckpointError: The family's table does not hold exactly one of each.
        """
        return cls(_contracting(checkpoint, "attention", "v_dim"), _contracting(checkpoint, "ffn", "ffn"))


@dataclass
class Tapped:
    """What went into the output projections of a layer at its last call, by part: (B, T, width)."""

    inputs: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _LayerSums:
    """What is gathered of one layer."""

    attention: ActivationMean
    ffn: ActivationMean
    influence: Influence
    moments: dict[str, SecondMoment]

    @classmethod
    def empty(cls, stream: LayerStream, *, second_moments: bool) -> _LayerSums:
        widths, device = output_widths(stream.checkpoint), stream.device
        moments = {part: SecondMoment(width, device) for part, width in widths.items()} if second_moments else {}
        means = {part: ActivationMean(width, device) for part, width in widths.items()}
        return cls(means["attention"], means["ffn"], Influence(device), moments)

    def add(self, tapped: Tapped, before: Tensor, after: Tensor, real: Tensor | None) -> None:
        """Gathers a batch: inputs of the output projections, and the residual stream on both sides of the layer."""
        inputs = {part: tokens_of(tensor, real) for part, tensor in tapped.inputs.items()}
        self.attention.add(inputs["attention"])
        self.ffn.add(inputs["ffn"])
        for part, moment in self.moments.items():
            moment.add(inputs[part])
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
        attention's output projection; ``influence`` () 1 - mean cosine of the layer's input and output;
        ``contribution`` () mean ||f(x)|| / ||x + f(x)||. With ``second_moments`` also ``neuron_moments`` (F, F) and
        ``attention_moments`` (Q d, Q d), means over tokens of x x^T.
    """
    checkpoint, outputs = stream.checkpoint, Outputs.of(stream.checkpoint)
    sums = _LayerSums.empty(stream, second_moments=second_moments)
    with stream.layer(index) as layer, tap(layer, outputs) as tapped:
        for i, batch in enumerate(batches):
            before, real = hidden[i], _real(batch, stream.device)
            hidden[i] = stream.advance(index, layer, before, batch)
            sums.add(tapped, before, hidden[i], real)
            residual.add(tokens_of(hidden[i], real))
            tapped.inputs.clear()  # or they would stand in memory beside the next batch's
            finished(batch)
        columns = {
            "attention": column_norms(layer, outputs.attention),
            "ffn": column_norms(layer, outputs.ffn),
        }
    heads = checkpoint.sizes["q_head"], checkpoint.sizes["v_dim"]
    attention, neurons = sums.attention.mean(), sums.ffn.mean()
    measured = {
        "neuron_activation": neurons,
        "neuron_importance": neurons * columns["ffn"],
        "attention_activation": attention.view(heads),
        "attention_importance": (attention * columns["attention"]).view(heads),
        "influence": sums.influence.block_influence(),
        "contribution": sums.influence.contribution(),
    }
    for part, moment in sums.moments.items():
        measured[MOMENTS[part]] = moment.sums["gram"].div_(max(1, moment.tokens))
    return {name: tensor.cpu() for name, tensor in measured.items()}


@contextmanager
def tap(layer: nn.Module, outputs: Outputs) -> Iterator[Tapped]:
    """Notes what goes into the output projections of ``layer``, for the duration of the block."""
    tapped = Tapped()

    def note(part: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: tapped.inputs.__setitem__(part, args[0])

    hooks = [
        module_of(layer, spec).register_forward_pre_hook(note(part))
        for part, spec in (("attention", outputs.attention), ("ffn", outputs.ffn))
    ]
    try:
        yield tapped
    finally:
        for hook in hooks:
            hook.remove()


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
