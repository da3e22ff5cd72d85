"""Losses of fine-tuning, in nats a token, and how much each weighs at a step. M scored tokens, V vocabulary.

* ``full``: cross-entropy at the full dial.
* ``dial``: cross-entropy at the sampled dial.
* ``distill``: KL(teacher || sampled dial); the teacher is the model's own full dial or the frozen parent.
* ``distill_full``: KL(parent || full dial), which holds the full dial to what the parent says.
* ``router``: what ``curve`` and ``class`` routers learn from. ``gate`` routers learn from the losses at the dial.
* ``consistency``: KL(higher dial || sampled dial), two sampled dials on the same batch.

Teachers get no gradient. All divergences are forward, on logits, at temperature 1.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from dynaconv.config import LossConfig, LossesConfig

AT_DIAL = ("dial", "distill", "consistency")  # losses at the sampled dial


def weight(loss: LossConfig, step: int, steps: int) -> float:
    """Weight of ``loss`` at ``step`` of ``steps``: nothing up to ``after``, a straight rise over ``ramp``, then all."""
    if step < loss.after * steps:
        return 0.0
    if not loss.ramp:
        return loss.weight
    return loss.weight * min(1.0, (step + 1 - loss.after * steps) / (loss.ramp * steps))


def weights(losses: LossesConfig, step: int, steps: int) -> dict[str, float]:
    """Weight of every loss at ``step``, by name."""
    return {name: weight(getattr(losses, name), step, steps) for name in losses.__dataclass_fields__}


def log_probabilities(logits: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities (M, V) float32 of ``logits`` (B, T, V) where ``mask`` (B, T - 1) says the next token counts."""
    return functional.log_softmax(logits[:, :-1][mask].float(), dim=-1)


def cross_entropy(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of ``log_probabilities`` (M, V) on ``targets`` (M,); 0 where M is 0."""
    return functional.nll_loss(log_probabilities, targets) if len(targets) else log_probabilities.sum()


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL(teacher || student) of log-probabilities (M, V), 0 where M is 0; the teacher gets no gradient."""
    if not len(student):
        return student.sum()
    return functional.kl_div(student, teacher.detach(), log_target=True, reduction="batchmean")
