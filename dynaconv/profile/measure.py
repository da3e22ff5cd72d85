"""What is measured of one layer: how much each neuron matters, and how much output each width loses.

Pass A runs the layer over all batches and gathers mean |activation|, and for routed experts which neurons are active
together; that fixes the order of the neurons. Pass B recomputes only the FFN, neurons in that order, from its kept
inputs on a share of the tokens, and gathers difficulty curves and what a closed-form router needs.

Errors are relative to the output of the down projection without its bias. In families that normalise the FFN's output
before adding it (Gemma 2 and 3, OLMo 2) that is before the norm.

M tokens, B batch, T tokens in a window, D residual width, F FFN width, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynaconv.arch.spec import FFNSpec
from dynaconv.data.windows import Batch
from dynaconv.dynamic.curves import contributions, log_errors, log_norms, relative_errors
from dynaconv.dynamic.projections import ffn_weights
from dynaconv.kernels.reference import hidden_neurons
from dynaconv.kernels.weights import FFNWeights
from dynaconv.profile.accumulators import ActivationMean, CurveStatistics, RidgeStatistics
from dynaconv.profile.calibration import own_rows
from dynaconv.profile.clusters import Coactivation, expert_order
from dynaconv.profile.streaming import LayerStream, predicting
from dynaconv.ranks import Ranks

ORDERS = ("importance", "none")
ROWS = 1024  # tokens whose curves are measured at once


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
        """Curves on the first ``curve_share`` of the windows, on tokens that predict another one.

        The last token of a window bears no loss and would count as worthless in a loss-aware curve.
        """
        windows = round(curve_share * sum(len(batch.input_ids) for batch in batches))
        left, masks = max(1, windows), []
        for batch in batches:
            mask = predicting(batch)
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


class Tap:
    """What went into an FFN and into its down projection at the last call.

    Attributes:
        x: The FFN's input (M, D), the tokens of the batch in order.
        hidden: Activations of the neurons (M, F).
    """

    x: Tensor
    hidden: Tensor

    @classmethod
    @contextmanager
    def on(cls, owner: nn.Module, spec: FFNSpec) -> Iterator[Tap]:
        """Taps the FFN whose projections lie in ``owner``, for the duration of the block."""
        tap = cls()
        hooks = [
            owner.get_submodule(name).register_forward_pre_hook(
                lambda _, args, seen=seen: setattr(tap, seen, args[0].reshape(-1, args[0].shape[-1]))
            )
            for name, seen in ((spec.up, "x"), (spec.down, "hidden"))
        ]
        try:
            yield tap
        finally:
            for hook in hooks:
                hook.remove()


def measure_layer(
    stream: LayerStream,
    index: int,
    hidden: list[Tensor],
    sample: Sample,
    *,
    order: str,
    edges: Sequence[int],
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
        edges: N + 1 neuron positions.
        experts: ``nested``, or ``routed``, whose neurons are clustered and of which single blocks are measured.
        weights: ``(curve tokens,)``, what the loss feels of an error of each token in this layer, or ``None``.
        finished: Called after each batch.
        ranks: The processes that each measure some of the batches; alone by default.

    Returns:
        ``activation``, ``importance`` (F,), ``order`` (F,) int64, ``curve_mean`` (N + 1,), ``curve_quantiles``
        (3, N + 1), ``feature_gram`` (D + 1, D + 1), ``feature_target`` (D + 1, N), float32, on the CPU.
    """
    spec = stream.checkpoint.family.ffn
    with stream.layer(index) as layer:
        ffn = stream.ffn(layer)
        stock = ffn_weights(ffn, spec.gate, spec.up, spec.down, stream.activation)
        sizes = torch.linalg.vector_norm(stock.down, dim=0, dtype=torch.float32)
        together = Coactivation(sizes, sample.windows(ranks)) if experts == "routed" else None
        activation, kept = _run(stream, index, layer, hidden, sample, together, finished)
        if ranks is not None:
            activation.gather(ranks)
        mean = activation.mean()
        importance = mean * sizes
        if together is None:
            ranked = ranking(importance, order)
        else:
            ranked = expert_order(together.features(ranks), importance, len(edges) - 1).to(stream.device)
        ordered = ordered_weights(stock, ranked)
        curves, ridge = measure_curves(kept, ordered, edges, experts, weights)
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
    edges: Sequence[int],
    experts: str = "nested",
    weights: Tensor | None = None,
) -> tuple[CurveStatistics, RidgeStatistics]:
    """Pass B: curves and regression statistics of FFN ``inputs`` (M, D) under weights whose neurons are in order.

    Args:
        inputs: Pieces, in the order of ``weights``.
        ordered: The FFN.
        edges: N + 1 neuron positions.
        experts: ``nested``: curves are those of prefixes, and what is regressed. ``routed``: curves are those of each
            token's best blocks, and what is regressed is what every block adds.
        weights: ``(tokens of all pieces,)`` or ``None``.
    """
    blocks, width, device = len(edges) - 1, ordered.up.shape[1], ordered.up.device
    curves, ridge = CurveStatistics(blocks, device), RidgeStatistics(width, blocks, device)
    start = 0
    for x in (rows for piece in inputs for rows in torch.split(piece, ROWS)):
        h = hidden_neurons(x, ordered)
        felt = None if weights is None else weights[start : start + len(x)].to(device)
        if experts == "routed":
            norms, errors = contributions(h, ordered.down, edges)
            targets = log_norms(norms, felt)
        else:
            errors = relative_errors(h, ordered.down, edges)
            targets = log_errors(errors, felt)
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
    together: Coactivation | None,
    finished: Callable[[Batch], None],
) -> tuple[ActivationMean, list[Tensor]]:
    """Pass A: mean |activation|, and the FFN's input (M, D) at the curve tokens of each batch.

    ``together`` samples tokens where experts are to be clustered.
    """
    activation, kept = ActivationMean(stream.checkpoint.sizes["ffn"], stream.device), list[Tensor]()
    with Tap.on(stream.ffn(layer), stream.checkpoint.family.ffn) as tap:
        for i, (batch, mask) in enumerate(zip(sample.batches, sample.curve_masks, strict=True)):
            hidden[i] = stream.advance(index, layer, hidden[i], batch)
            real = batch.attention_mask
            active = tap.hidden if real is None else tap.hidden[real.flatten().to(stream.device)]
            activation.add(active)
            if together is not None:
                together.add(active, batch)
            if bool(mask.any()):
                kept.append(tap.x[mask.flatten().to(stream.device)])
            del tap.x, tap.hidden, active  # or they would stand in memory beside the next batch's
            finished(batch)
    return activation, kept
