"""What the routers do, by layer: which widths they give, how often they are right, and what the widths depend on.

M tokens, N blocks, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dynaconv.dynamic.recorder import Recorder
from dynaconv.train.micro_batch import MicroBatch
from dynaconv.train.objectives.base import Outcome
from dynaconv.train.tokens import real_tokens

BINS = 8  # of difficulty, each with as many tokens


def share_spent(recorder: Recorder, mask: Tensor | None) -> float:
    """Mean share of the FFN bytes that was recorded, over sites and the tokens where ``mask`` (B, T) is not padding."""
    return torch.stack([real_tokens(found[0][2], mask).mean() for found in recorder.shares.values()]).mean().item()


def score_std(recorder: Recorder, mask: Tensor | None, features: int) -> float:
    """Standard deviation of the scores that were recorded, over sites, tokens (and blocks)."""
    scores = [real_tokens(found[0].float(), mask, features=features) for found in recorder.scores.values()]
    return torch.stack(scores).std().item()


def micro_batch_statistics(
    micro: MicroBatch, recorder: Recorder, outcome: Outcome, blocks: int, accuracies: Mapping[int, float]
) -> dict[str, float]:
    """:func:`router_statistics` over the scored tokens of a micro-batch, weighted by its share of the step."""
    ids, mask = micro.batch.input_ids, micro.batch.predicted
    widths = {site: found[0].view_as(ids)[:, :-1][mask] for site, found in recorder.widths.items()}
    losses = -outcome["full"].gather(1, outcome.targets[:, None])[:, 0]
    found = router_statistics(widths, ids[:, :-1][mask], losses, blocks, accuracies)
    return {name: value * micro.weights["scored"] for name, value in found.items()}


def router_statistics(
    widths: Mapping[int, Tensor], token_ids: Tensor, losses: Tensor, blocks: int, accuracies: Mapping[int, float]
) -> dict[str, float]:
    """Statistics of one batch, ``layer<l>/<name>``; information and entropy in nats.

    Args:
        widths: (M,) int64 by layer, in 0..N.
        token_ids: (M,) the token at each position.
        losses: (M,) its loss at the full dial: the token's difficulty.
        blocks: N.
        accuracies: Share of tokens whose width is the label's, by layer, where there are labels.
    """
    ids = torch.unique(token_ids, return_inverse=True)[1]  # (M,)
    difficulty = losses.argsort().argsort() * BINS // len(losses)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).to(ids.device)
    found: dict[str, float] = {}
    for layer, used in sorted(widths.items()):
        counts = torch.bincount(used, minlength=blocks + 1).double()
        found[f"layer{layer}/width_mean"] = used.double().mean().item()
        found[f"layer{layer}/width_std"] = used.double().std(correction=0).item()
        found[f"layer{layer}/width_entropy"] = entropy(counts).item()
        found[f"layer{layer}/token_information"] = information(used, ids, order).item()
        found[f"layer{layer}/difficulty_information"] = information(used, difficulty, order).item()
        if layer in accuracies:
            found[f"layer{layer}/label_accuracy"] = accuracies[layer]
    return found


def entropy(counts: Tensor) -> Tensor:
    """Entropy of a histogram, in nats."""
    shares = counts.flatten() / counts.sum()
    return -torch.special.xlogy(shares, shares).sum()


def information(first: Tensor, second: Tensor, order: Tensor) -> Tensor:
    """Mutual information of two whole-numbered variables (M,), in nats.

    Counted from few tokens it comes out too large, most of all where one variable has many values, as token ids do. So
    what remains after ``second`` is shuffled, which is nothing but that error, is taken off.

    Args:
        first: (M,) int64 from 0.
        second: (M,) int64 from 0.
        order: (M,) a permutation.
    """
    return _counted(first, second) - _counted(first, second[order])


def _counted(first: Tensor, second: Tensor) -> Tensor:
    rows, columns = int(first.max()) + 1, int(second.max()) + 1
    joint = torch.bincount(first * columns + second, minlength=rows * columns).view(rows, columns).double()
    return entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint)
