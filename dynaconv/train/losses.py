"""Losses of fine-tuning, in nats a token. B batch, T tokens, V vocabulary."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def cross_entropy(logits: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Mean next-token loss of ``logits`` (B, T, V) over ``mask`` (B, T - 1)."""
    return functional.cross_entropy(logits[:, :-1][mask].float(), input_ids[:, 1:][mask])


def distillation(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean KL(teacher || student) at temperature 1 over ``mask`` (B, T - 1); the teacher gets no gradient."""
    wanted = functional.log_softmax(teacher.detach()[:, :-1][mask].float(), dim=-1)
    got = functional.log_softmax(student[:, :-1][mask].float(), dim=-1)
    return functional.kl_div(got, wanted, log_target=True, reduction="batchmean")
