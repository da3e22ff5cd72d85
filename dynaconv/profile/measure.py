"""What is measured of one layer: how much each neuron matters, and how much output each width loses.

Pass A runs the layer over all batches and gathers mean |activation|, and for routed experts which neurons are active
together; that fixes the order of the neurons. Pass B recomputes only the FFN, neurons in that order, from its kept
inputs on a share of the tokens, and gathers difficulty curves and what a closed-form router needs.

Errors are relative to the output of the down projection without its bias. In families that normalise the FFN's output
before adding it (Gemma 2 and 3, OLMo 2) that is before the norm.

M tokens, B batch, T tokens in a window, D residual width, F FFN width, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dynaconv.arch.spec import FFNSpec
from dynaconv.data.windows import Batch, scored_tokens
from dynaconv.dynamic.few_bits import norms
from dynaconv.dynamic.projections import ffn_weights
from dynaconv.dynamic.score_histogram import LOWEST, WIDTH, ScoreHistogram
from dynaconv.kernels.partition import Partition
from dynaconv.kernels.reference import hidden_neurons
from dynaconv.kernels.sketched import SMALLEST
from dynaconv.kernels.weights import FFNWeights
from dynaconv.profile.accumulators import ActivationMean, CurveStatistics, RidgeStatistics
from dynaconv.profile.calibration import own_rows
from dynaconv.profile.capture import Captured, capture
from dynaconv.profile.clusters import Coactivation, expert_order
from dynaconv.profile.curves import (
    BlockNorms,
    best_block_errors,
    curve_widths,
    log_errors,
    log_norms,
    relative_errors,
)
from dynaconv.profile.streaming import LayerStream
from dynaconv.ranks import Ranks

ORDERS = ("importance", "none")
ROWS = 1024  # tokens whose curves are measured at once
AT_ONCE = 1024  # tokens of a batch that pass a layer together, as long as a window is shorter
LEVEL_SHARE = 0.3  # of the neurons: in the middle of what dials ask for
LEVEL_EVERY = 8  # tokens, of which one is counted: a layer's level needs no more


@dataclass(frozen=True)
class Sample:
    """Which tokens are measured.

    Attributes:
        batches: Calibration text.
        curve_masks: For each batch, the tokens that difficulty curves are measured on, (B, T) bool.
    """

    batches: Sequence[Batch]
    curve_masks: Sequence[Tensor]

    @classmethod
    def of(cls, batches: Sequence[Batch], curve_share: float) -> Sample:
        """Curves on the first ``curve_share`` of the windows, on :func:`scored_tokens`.

        Others bear no loss, such as the last token of a window, and would count as worthless in a loss-aware curve.
        """
        windows = round(curve_share * sum(len(batch.input_ids) for batch in batches))
        left, masks = max(1, windows), []
        for batch in batches:
            mask = scored_tokens(batch)
            mask[left:] = False
            left = max(0, left - len(mask))
            masks.append(mask)
        return cls(batches, masks)

    def own(self, ranks: Ranks) -> Sample:
        """This rank's windows of every batch, and the tokens of them that curves are measured on.

        Raises:
            ConfigError: There are more ranks than a batch has sequences.
        """
        masks = [mask[slice(*ranks.rows(len(mask)))] for mask in self.curve_masks]
        batches = own_rows(self.batches, ranks, what="profile.batch_size")
        return Sample(batches, [mask for mask in masks if len(mask)])

    def in_pieces(self, tokens: int = AT_ONCE) -> Sample:
        """The same windows in batches of ``tokens`` at most, or of one window: activations take memory."""
        batches, masks = list[Batch](), list[Tensor]()
        for batch, mask in zip(self.batches, self.curve_masks, strict=True):
            rows = max(1, tokens // mask.shape[1])
            batches += [batch.rows(start, start + rows) for start in range(0, len(mask), rows)]
            masks += torch.split(mask, rows)
        return Sample(batches, masks)

    def windows(self, ranks: Ranks | None = None) -> int:
        """Windows of all ranks."""
        own = torch.tensor(sum(len(batch.input_ids) for batch in self.batches))
        return int(own if ranks is None else ranks.sum(own))

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(batch.tokens for batch in self.batches)

    @property
    def curve_tokens(self) -> int:
        """Tokens that curves are measured on."""
        return sum(int(mask.sum()) for mask in self.curve_masks)


def capture_ffn(owner: nn.Module, spec: FFNSpec) -> AbstractContextManager[Captured]:
    """Captures ``x``, what goes into the FFN whose projections lie in ``owner``, and its activations ``hidden``."""
    return capture(inputs={"x": owner.get_submodule(spec.up), "hidden": owner.get_submodule(spec.down)})


class Contributions:
    """What ``sketch`` routers want to know of single neurons, from one token in :data:`LEVEL_EVERY`.

    Args:
        weights: The FFN.
        sizes: Norms of the down columns, (F,) float32.
    """

    def __init__(self, weights: FFNWeights, sizes: Tensor) -> None:
        self.weights, self.sizes, self.scores = weights, sizes, ScoreHistogram()
        self.ups, self.tokens = torch.zeros_like(sizes, dtype=torch.float64), torch.zeros((), dtype=torch.int64)

    def add(self, x: Tensor, active: Tensor) -> None:
        """Counts tokens with FFN inputs ``x`` (M, D) and activations ``active`` (M, F)."""
        x, active = x[::LEVEL_EVERY], active[::LEVEL_EVERY]
        self.scores.add((active.float().abs() * self.sizes).clamp_min(SMALLEST).log())
        sizes = norms(x, dim=-1, keepdim=True).clamp_min(SMALLEST)
        ups = linear(x, self.weights.up, self.weights.up_bias).float().abs() / sizes
        self.ups += ups.sum(0, dtype=torch.float64)
        self.tokens += len(x)

    def gather(self, ranks: Ranks) -> None:
        """Adds up what all ranks counted."""
        self.scores.counts, self.ups, self.tokens = map(ranks.sum, (self.scores.counts, self.ups.cpu(), self.tokens))

    def up_means(self) -> Tensor:
        """Mean of |up x| / ||x|| for each neuron, (F,) float32."""
        return (self.ups.cpu() / self.tokens.clamp_min(1)).float()

    def level(self) -> Tensor:
        """The logarithm of what a neuron adds that stands at :data:`LEVEL_SHARE` from the top, () float32.

        Of the neurons that add anything: with ReLU that may be a tenth.
        """
        share = LEVEL_SHARE * self.scores.above(LOWEST + WIDTH)
        return torch.tensor(self.scores.quantile(share), dtype=torch.float32)


def measure_layer(
    stream: LayerStream,
    index: int,
    hidden: list[Tensor],
    sample: Sample,
    *,
    order: str,
    partition: Partition,
    experts: str = "nested",
    weights: Tensor | None = None,
    finished: Callable[[Batch], None] = lambda batch: None,
    ranks: Ranks | None = None,
) -> dict[str, Tensor]:
    """Measures decoder layer ``index`` and moves the hidden states behind it.

    Args:
        stream: The model.
        index: Which layer.
        hidden: For each batch, the layer's input (B, T, D); replaced by its output.
        sample: Which tokens.
        order: ``importance`` or ``none``, of nested experts.
        partition: The blocks.
        experts: ``nested``; ``routed``, whose neurons are clustered and of which single blocks are measured; or
            ``neurons``, which stay where they are, and of which only the layer's level is measured.
        weights: ``(curve tokens,)``, sensitivity of the loss to an error of each token in this layer, or ``None``.
        finished: Called after each batch.
        ranks: The processes that each measure some of the batches; alone by default.

    Returns:
        ``activation``, ``importance`` (F,), ``order`` (F,) int64, float32, on the CPU. Of ``neurons``, ``level`` () and
        ``up_mean`` (F,); of others, ``curve_mean`` (W,), ``curve_quantiles`` (3, W), of the W :func:`curve_widths`,
        ``feature_gram`` (D + 1, D + 1), ``feature_target`` (D + 1, N).
    """
    spec = stream.checkpoint.family.ffn
    with stream.layer(index) as layer:
        ffn = stream.ffn(layer)
        stock = ffn_weights(ffn, spec.gate, spec.up, spec.down, stream.activation)
        sizes = torch.cat([norms(piece, dim=0) for piece in torch.split(stock.down, ROWS, dim=1)])  # norms makes copies
        together = Coactivation(sizes, sample.windows(ranks)) if experts == "routed" else None
        contributions = Contributions(stock, sizes) if experts == "neurons" else None
        activation, kept = _run(stream, index, layer, hidden, sample, together or contributions, finished)
        if ranks is not None:
            activation.gather(ranks)
        mean = activation.mean()
        importance = mean * sizes
        if contributions is not None:
            if ranks is not None:
                contributions.gather(ranks)
            order_kept = torch.arange(len(mean))
            measured = {"activation": mean, "importance": importance, "order": order_kept}
            measured |= {"level": contributions.level(), "up_mean": contributions.up_means()}
            return {name: tensor.cpu() for name, tensor in measured.items()}
        if together is None:
            ranked = ranking(importance, order)
        else:
            ranked = expert_order(together.features(ranks), importance, partition).to(stream.device)
        ordered = ordered_weights(stock, ranked)
        curves, ridge = measure_curves(kept, ordered, partition, experts, weights)
        if ranks is not None:
            curves, ridge = curves.gather(ranks), ridge.gather(ranks)
    measured = {
        "activation": mean,
        "importance": importance,
        "order": ranked,
        "curve_mean": curves.mean(),
        "curve_quantiles": curves.quantiles(),
        "feature_gram": ridge.sums["gram"],
        "feature_target": ridge.sums["target"],
    }
    return {name: tensor.cpu() for name, tensor in measured.items()}


def measure_curves(
    inputs: Sequence[Tensor],
    ordered: FFNWeights,
    partition: Partition,
    experts: str = "nested",
    weights: Tensor | None = None,
) -> tuple[CurveStatistics, RidgeStatistics]:
    """Pass B: curves and regression statistics of FFN ``inputs`` (M, D) under weights whose neurons are in order.

    Args:
        inputs: Pieces, in the order of ``weights``.
        ordered: The FFN.
        partition: The blocks.
        experts: ``nested``: curves are those of prefixes, and what is regressed. ``routed``: curves are those of each
            token's best blocks, and what is regressed is what every block adds.
        weights: ``(tokens of all pieces,)`` or ``None``.
    """
    device, down, widths = ordered.up.device, ordered.down, curve_widths(partition, experts)
    curves, ridge = CurveStatistics(len(widths), device), RidgeStatistics(ordered.up.shape[1], partition.blocks, device)
    block_norms = BlockNorms(down, partition) if experts == "routed" else None
    start = 0
    for x in (rows for piece in inputs for rows in torch.split(piece, ROWS)):
        h = hidden_neurons(x, ordered)
        sensitivity = None if weights is None else weights[start : start + len(x)].to(device)
        if block_norms is None:
            errors = relative_errors(h, down, partition.edges)
            targets = log_errors(errors, sensitivity)
        else:
            added = block_norms(h)
            errors = best_block_errors(h, down, partition, added, widths)
            targets = log_norms(added, sensitivity)
        curves.add(errors)
        ridge.add(x, targets)
        start += len(x)
    return curves, ridge


def ranking(importance: Tensor, order: str) -> Tensor:
    """Neurons in the order they are cut in, (F,) int64: by falling importance, ties by position; or as they are."""
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; it must be one of {', '.join(ORDERS)}")
    if order == "none":
        return torch.arange(len(importance), device=importance.device)
    return importance.argsort(descending=True, stable=True)


def ordered_weights(stock: FFNWeights, order: Tensor) -> FFNWeights:
    """A copy of ``stock`` with its neurons in ``order`` and without the down bias."""
    return FFNWeights(
        gate=None if stock.gate is None else stock.gate[order],
        up=stock.up[order],
        down=stock.down[:, order],
        activation=stock.activation,
        gate_bias=None if stock.gate_bias is None else stock.gate_bias[order],
        up_bias=None if stock.up_bias is None else stock.up_bias[order],
    )


def _run(
    stream: LayerStream,
    index: int,
    layer: nn.Module,
    hidden: list[Tensor],
    sample: Sample,
    together: Coactivation | Contributions | None,
    finished: Callable[[Batch], None],
) -> tuple[ActivationMean, list[Tensor]]:
    """Pass A: mean |activation|, and the FFN's input (M, D) at the curve tokens of each batch.

    The mean, and the sample that ``together`` takes where experts are to be clustered, are of all real tokens, not of
    the scored ones alone: at a low dial a user's question runs through the same blocks as the answer, which reads it.
    """
    activation, kept = ActivationMean(stream.checkpoint.sizes["ffn"], stream.device), list[Tensor]()
    with capture_ffn(stream.ffn(layer), stream.checkpoint.family.ffn) as captured:
        for i, (batch, mask) in enumerate(zip(sample.batches, sample.curve_masks, strict=True)):
            hidden[i] = stream.advance(index, layer, hidden[i], batch)
            x, active = (captured.inputs[name].flatten(0, -2) for name in ("x", "hidden"))
            real = x
            if batch.attention_mask is not None:
                kept_rows = batch.attention_mask.flatten().to(stream.device)
                real, active = x[kept_rows], active[kept_rows]
            activation.add(active)
            if isinstance(together, Contributions):
                together.add(real, active)
            elif together is not None:
                together.add(active, batch)
            if bool(mask.any()) and not isinstance(together, Contributions):
                kept.append(x[mask.flatten().to(stream.device)])
            del x, real, active
            captured.clear()
            finished(batch)
    return activation, kept
