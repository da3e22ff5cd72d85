"""Losses of fine-tuning, in nats a token. B batch, T tokens, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def next_token_mask(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor:
    """(B, T - 1) bool: positions whose next token is real."""
    if attention_mask is None:
        return torch.ones_like(input_ids[:, 1:], dtype=torch.bool)
    return attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()


def cross_entropy(logits: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Mean next-token loss of ``logits`` (B, T, V) over ``mask`` (B, T - 1)."""
    return functional.cross_entropy(logits[:, :-1][mask].float(), input_ids[:, 1:][mask])


def distillation(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean KL(teacher || student) at temperature 1 over ``mask`` (B, T - 1); the teacher gets no gradient."""
    wanted = functional.log_softmax(teacher.detach()[:, :-1][mask].float(), dim=-1)
    got = functional.log_softmax(student[:, :-1][mask].float(), dim=-1)
    return functional.kl_div(got, wanted, log_target=True, reduction="batchmean")
