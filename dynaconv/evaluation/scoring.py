"""Loss, agreement and cost of a policy over fixed batches. B sequences, T tokens, L layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynaconv.data.windows import Batch
from dynaconv.dynamic.policy import AfterPrompt, Full, Policy
from dynaconv.dynamic.recorder import Recorder
from dynaconv.ranks import Ranks


@dataclass(frozen=True)
class Score:
    """What scoring found; shares and widths are means over layers and tokens.

    Attributes:
        loss: Mean loss in nats a predicted token.
        active_share: Share of neurons that are used.
        exact_share: Share of neurons that are used with exact values.
        bytes_share: FFN bytes read, as a share of the parent's, routers counted.
        flops_share: FFN FLOPs computed, as a share of the parent's, routers counted.
        agreement: Share of positions with the parent's most likely token; ``None`` without a parent.
        tokens: Predicted tokens scored.
        widths: Mean width of each layer, in blocks.
    """

    loss: float
    active_share: float
    exact_share: float
    bytes_share: float
    flops_share: float
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
    prompted: bool = False,
) -> Score:
    """Runs ``batches`` under ``policy``.

    Args:
        model: A dynamic model, or a dense one with ``policy`` left ``None``.
        batches: Windows of text.
        policy: How widths are decided; all blocks when ``None``.
        parent: The parent's most likely tokens on the same batches (:func:`most_likely`).
        ranks: The processes that each score some of the batches; alone by default.
        prompted: The first half of each sequence is a prompt, read at the full dial; the second half alone is scored.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    sums = torch.zeros(0, dtype=torch.float64)
    call = getattr(model, "call", None)
    for i, batch in enumerate(batches):
        batch, recorder, half = batch.to(device), Recorder(), batch.input_ids.shape[1] // 2
        using = policy or Full()
        if prompted:
            using = AfterPrompt(using, half, batch.input_ids.shape[1])
        with nullcontext() if call is None else call.using(using, recorder):
            logits = model(**_inputs(batch)).logits
        mask = batch.predicted
        if prompted:
            mask = mask & (torch.arange(mask.shape[1], device=device) >= half)
        picked, wanted = logits[:, :-1][mask].float(), batch.input_ids[:, 1:][mask]
        loss = float(torch.nn.functional.cross_entropy(picked, wanted, reduction="sum"))
        agreeing = 0
        if parent is not None:
            agreeing = int((picked.argmax(-1).cpu() == parent[i][:, :-1][mask.cpu()]).sum())
        found = [loss, len(wanted), agreeing, batch.tokens, *([] if call is None else _spent(recorder, batch))]
        sums = torch.tensor(found, dtype=torch.float64) + (sums if len(sums) else 0)
    model.train(was_training)
    if ranks is not None:
        sums = ranks.sum(sums)
    loss, count, agreeing, tokens, *spent = sums.tolist()
    active, exact, read, computed, *widths = [one / tokens for one in spent] or [1.0] * 4
    return Score(
        loss=loss / count,
        active_share=active,
        exact_share=exact,
        bytes_share=read,
        flops_share=computed,
        agreement=agreeing / count if parent is not None else None,
        tokens=int(count),
        widths=tuple(widths),
    )


def _spent(recorder: Recorder, batch: Batch) -> list[float]:
    """Sums over the tokens that are not padding: four shares, means over layers, and the width of each layer."""
    widths, shares = recorder.all_widths(), recorder.all_costs()  # (L, B * T), (4, L, B * T)
    if batch.attention_mask is not None:
        real = batch.attention_mask.flatten()
        widths, shares = widths[:, real], shares[..., real]
    return [*shares.mean(1).sum(1).tolist(), *widths.double().sum(1).tolist()]


def _inputs(batch: Batch) -> dict[str, Any]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
