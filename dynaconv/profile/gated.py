"""Thresholds and means of single neurons, solved together while the model is gated.

One threshold for all sites says which neurons are on, another which of these have exact values, a fixed margin above
the first: a neuron of score s leaves an error of exp(2 s) where it is off, and of e exp(2 s) with low-bit values, whose
relative error is e. To spend bytes where they take away most error, low-bit values begin where exp(2 s) (1 - e) / c_low
passes a level, and exact ones where exp(2 s) e / (c_exact - c_low) passes the same: the margin is half the logarithm of
the ratio, whatever the budget.

Neurons that are off give the mean of their activation over the tokens for which they are off, so each budget has means
of its own. They are measured at that budget, with those of the next higher one in place.

L sites, F neurons, G budgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv.data.windows import Batch
from dynaconv.dynamic.cost import UnitCost
from dynaconv.dynamic.dial import Dial
from dynaconv.dynamic.few_bits import FewBitCopy
from dynaconv.dynamic.layout import DialTable
from dynaconv.dynamic.policy import ByThreshold, Full, Policy, at_one_threshold
from dynaconv.dynamic.recorder import Record, Recorder
from dynaconv.dynamic.routers.sketch import SketchRouter
from dynaconv.dynamic.score_histogram import NeuronScores
from dynaconv.errors import QualityError
from dynaconv.ranks import Ranks

PASSES = 3
"""Forward passes over the text for each budget, at most."""
NEARLY_ALL = 0.999
"""Share of neurons that are on at the last row of the table, towards which thresholds are interpolated."""


class NeuronRecorder(Recorder):
    """Counts scores and costs, and adds up the activations of neurons that are off, of tokens that are not padding.

    Attributes:
        attention_mask: Of the batch under way, (B, T) bool, or ``None``.
        scores_of_all: Of all sites.
        spent: Sum of the shares of bytes read, over tokens and sites.
        count: Of how many.
        sums: By site, of activations where neurons are off, (F,) float64.
        off: By site, how often each neuron was off, (F,) float64.
    """

    def __init__(
        self, router: SketchRouter, *, attention_mask: Tensor | None = None, wants_hidden: bool = False
    ) -> None:
        super().__init__()
        self.router, self.attention_mask, self.wants_hidden = router, attention_mask, wants_hidden
        self._gathered = False
        self.scores_of_all, self.spent, self.count = NeuronScores(), 0.0, 0
        self.sums: dict[int, Tensor] = {}
        self.off: dict[int, Tensor] = {}

    def record(self, record: Record) -> None:
        """See :meth:`Recorder.record`."""
        assert record.scores is not None
        real = None if self.attention_mask is None else self.attention_mask.flatten()
        scores, shares = record.scores.flatten(0, -2), record.bytes_share().flatten()
        if real is not None:
            scores, shares = scores[real], shares[real]
        try:
            self.scores_of_all.add(*self.router.parts(scores))
        except ValueError as error:
            hint = "look for NaN or infinity in its weights; a lower finetune.learning_rate, where it was tuned"
            raise QualityError(str(error), where=f"layer {record.site.index}", hint=hint) from error
        self.spent += float(shares.sum())
        self.count += len(shares)
        if record.hidden is None or record.choice is None:
            return
        off, hidden = ~record.choice.mask(record.site.blocks).flatten(0, -2), record.hidden.flatten(0, -2)
        if real is not None:
            off, hidden = off[real], hidden[real]
        index = record.site.index
        kept_off = off.to(hidden.dtype)
        added = (hidden * kept_off).float().sum(0).double(), kept_off.float().sum(0).double()
        for kept, new in zip((self.sums, self.off), added, strict=True):
            kept[index] = kept[index] + new if index in kept else new

    def gather(self, ranks: Ranks | None) -> None:
        """Adds up what all ranks recorded, once."""
        if ranks is None or self._gathered:
            return
        self._gathered = True
        for scores in (self.scores_of_all.compared, self.scores_of_all.closer):
            scores.counts = ranks.sum(scores.counts)
        spent = ranks.sum(torch.tensor([self.spent, self.count], dtype=torch.float64))
        self.spent, self.count = float(spent[0]), int(spent[1])
        for kept in (self.sums, self.off):
            for index in sorted(kept):
                kept[index] = ranks.sum(kept[index].cpu())

    @property
    def share(self) -> float:
        """Mean share of the parent's FFN bytes that was read."""
        return self.spent / self.count


def solve_neurons(
    model: Any,
    batches: Sequence[Batch],
    budgets: Sequence[float],
    *,
    measure_means: bool,
    tolerance: float = 0.005,
    solved: Callable[[float, float], None] = lambda budget, spent: None,
    ranks: Ranks | None = None,
) -> DialTable:
    """The dial table of ``model``, whose experts are single neurons.

    Args:
        model: A dynamic model with sketch routers, and a set of means for each budget where these are to be measured.
        batches: Text; of this rank, where there are several.
        budgets: Shares of the parent's FFN bytes, ascending, below 1.
        measure_means: Put into ``model`` what neurons give that are off.
        tolerance: Largest difference between a budget and what is spent.
        solved: Called with each budget and what is spent at its threshold.
        ranks: The processes that each have some of the text.
    """
    cost: UnitCost = model.ffns()[0].cost.bytes
    margin = exact_margin(model)
    scores = run_neurons(model, batches, Full(scored=True), ranks).scores_of_all
    everything = scores.compared.quantile(NEARLY_ALL)
    found: list[float] = []
    for place in reversed(range(len(budgets))):
        budget = budgets[place]
        if measure_means and place + 1 < len(budgets):
            for ffn in model.ffns():
                ffn.means.data[place] = ffn.means.data[place + 1]
        ask = budget
        for turn in range(PASSES):
            threshold = scores.threshold(ask, cost, margin)
            policy = gated_policy(model, budget, threshold, margin)
            seen = run_neurons(model, batches, policy, ranks, hidden=measure_means)
            scores, ask = seen.scores_of_all, ask + (budget - seen.share) / 2
            if measure_means:
                _take_means(model, place, seen)
            if turn and abs(seen.share - budget) <= tolerance:
                break
        found.append(max(threshold, found[-1] if found else everything - margin))  # where nearly all are exact
        solved(budget, seen.share)
    everything = min(everything, found[0])
    rows = [(threshold,) * model.layout.layers for threshold in (*reversed(found), everything)]
    exact_rows = [tuple(threshold + margin for threshold in row) for row in rows[:-1]] + [rows[-1]]
    return DialTable((*budgets, 1.0), tuple(rows), tuple(exact_rows) if margin else ())


def run_neurons(
    model: Any, batches: Sequence[Batch], policy: Policy, ranks: Ranks | None, *, hidden: bool = False
) -> NeuronRecorder:
    """Runs ``batches`` under ``policy``, which looks at scores."""
    device, router = next(model.parameters()).device, model.ffns()[0].router
    recorder = NeuronRecorder(router, wants_hidden=hidden)
    with torch.no_grad():
        for batch in (batch.to(device) for batch in batches):
            recorder.attention_mask = batch.attention_mask
            with model.call.using(policy, recorder):
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    recorder.gather(ranks)
    return recorder


def exact_margin(model: Any) -> float:
    """How far above the threshold of being on scores have exact values, in nats; 0 where all active neurons do."""
    ffns = model.ffns()
    if model.layout.copy is None or not model.layout.copy.values:
        return 0.0
    error = sum(_relative_error(ffn.copy, ffn.weights()) for ffn in ffns) / len(ffns)
    cost = ffns[0].cost.bytes
    error = min(max(error, 1e-9), 0.5)
    return max(1e-3, math.log((1 - error) * (cost.exact - cost.low) / (error * cost.low)) / 2)


def _relative_error(copy: FewBitCopy, weights: Any) -> float:
    """Mean square of what low-bit values add to or take from a neuron, over its own: of each matrix, added up."""
    copy.follow(weights)
    with torch.no_grad():
        low = copy.low(weights)
    pairs = [(weights.gate, low.gate), (weights.up, low.up), (weights.down, low.down)]
    with torch.no_grad():
        return sum(
            float((low - exact).float().square().sum() / exact.float().square().sum().clamp_min(1e-30))
            for exact, low in pairs
            if exact is not None
        )


def prepare_means(model: Any, budgets: Sequence[float]) -> None:
    """Gives ``model`` a set of means for each of ``budgets``: those it has, interpolated, else zeros."""
    for ffn in model.ffns():
        neurons = ffn.site.partition.neurons
        sets = torch.zeros(len(budgets), neurons, device=ffn.router.offset.device)
        if ffn.means is not None:
            for place, budget in enumerate(budgets):
                weights = torch.tensor(Dial(budget=budget).means(model.layout)).to(ffn.means)
                sets[place] = weights @ ffn.means.detach()
        ffn.means = nn.Parameter(sets)
        ffn.__dict__.pop("cost", None)
    model.layout = replace(model.layout, means=tuple(budgets))


def gated_policy(model: Any, budget: float, threshold: float, margin: float) -> ByThreshold:
    """The policy of ``threshold`` for all sites, with exact values ``margin`` above it, and the means of ``budget``."""
    weights = Dial(budget=budget).means(model.layout)
    means = torch.tensor(weights, device=next(model.parameters()).device) if weights else None
    exact = threshold + margin if margin else None
    return at_one_threshold(threshold, model.layout.layers, detached=True, exact=exact, means=means)


def _take_means(model: Any, place: int, seen: NeuronRecorder) -> None:
    """Puts what ``seen`` measured into set ``place``; neurons that were never off keep what they had."""
    for ffn in model.ffns():
        index = ffn.site.index
        mean = (seen.sums[index] / seen.off[index].clamp_min(1)).to(ffn.means)
        ffn.means.data[place] = torch.where(seen.off[index].to(ffn.means.device) > 0, mean, ffn.means.data[place])
