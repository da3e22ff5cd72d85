"""Loss, agreement and active share of a policy over fixed batches. T tokens a window, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynaconv.data.windows import Batch
from dynaconv.dynamic.policy import Full, Policy
from dynaconv.dynamic.recorder import Recorder
from dynaconv.ranks import Ranks


@dataclass(frozen=True)
class Score:
    """What a policy is worth and what it spends.

    Attributes:
        loss: Nats a token.
        active_share: Mean share of FFN neurons used, over real tokens and layers.
        agreement: Share of positions with the parent's most likely token; ``None`` without a parent.
        tokens: Predicted tokens scored.
        widths: Mean width of each layer, in blocks.
    """

    loss: float
    active_share: float
    agreement: float | None
    tokens: int
    widths: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


@torch.no_grad()
def most_likely(model: Any, batches: Iterable[Batch]) -> list[Tensor]:
    """The most likely next token at every position, (B, T) a batch, of a dense model."""
    device = next(model.parameters()).device
    found = []
    for batch in batches:
        logits = model(**_inputs(batch.to(device))).logits
        found.append(logits.argmax(-1).cpu())
    return found


@torch.no_grad()
def score(
    model: Any,
    batches: Sequence[Batch],
    policy: Policy | None = None,
    *,
    parent: Sequence[Tensor] | None = None,
    ranks: Ranks | None = None,
) -> Score:
    """Runs ``batches`` under ``policy``.

    Args:
        model: A dynamic model, or a dense one with ``policy`` left ``None``.
        batches: Windows of text.
        policy: How widths are decided; all blocks when ``None``.
        parent: The parent's most likely tokens on the same batches (:func:`most_likely`).
        ranks: The processes that each score some of the batches; alone by default.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    loss, count, agreeing, shares, widths = 0.0, 0, 0, 0.0, torch.zeros(0)
    call = getattr(model, "call", None)
    for i, batch in enumerate(batches):
        batch, recorder = batch.to(device), Recorder()
        with nullcontext() if call is None else call.using(policy or Full(), recorder):
            logits = model(**_inputs(batch)).logits
        mask = batch.predicted
        picked, wanted = logits[:, :-1][mask].float(), batch.input_ids[:, 1:][mask]
        loss += float(torch.nn.functional.cross_entropy(picked, wanted, reduction="sum"))
        count += len(wanted)
        if parent is not None:
            agreeing += int((picked.argmax(-1).cpu() == parent[i][:, :-1][mask.cpu()]).sum())
        if call is not None:
            used, spent = recorder.all_widths().cpu(), recorder.all_shares().cpu()  # (L, B * T)
            if batch.attention_mask is not None:
                real = batch.attention_mask.flatten().cpu()
                used, spent = used[:, real], spent[:, real]
            widths = widths + used.double().sum(1) if len(widths) else used.double().sum(1)
            shares += float(spent.mean(0).sum())
    model.train(was_training)
    tokens = sum(batch.tokens for batch in batches)
    if ranks is not None:
        sums = torch.tensor([loss, count, agreeing, shares, tokens, *widths.tolist()], dtype=torch.float64)
        loss, count, agreeing, shares, tokens, *rest = ranks.sum(sums).tolist()
        count, widths = int(count), torch.tensor(rest, dtype=torch.float64)
    return Score(
        loss=loss / count,
        active_share=shares / tokens if call is not None else 1.0,
        agreement=agreeing / count if parent is not None else None,
        tokens=count,
        widths=tuple((widths / tokens).tolist()),
    )


def _inputs(batch: Batch) -> dict[str, Any]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
