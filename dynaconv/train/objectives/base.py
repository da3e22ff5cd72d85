"""What an objective of fine-tuning is: a loss in nats, and the passes of a step that it looks at.

An objective is a class in a file beside this one, named in one line of :class:`dynaconv.config.LossesConfig`. Which
passes a step runs, what a run is estimated to take and which combinations a recipe may ask for all follow from
:attr:`Objective.needs`.

M scored tokens of a micro-batch, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional

from dynaconv.config import FinetuneConfig

Pass = Literal["full", "dial", "parent", "second", "labels"]
"""A pass of a step, in the order in which they run when all are needed:

* ``parent``: the frozen dense checkpoint;
* ``full``: the model at the full dial;
* ``second``: the model at a second dial, not below the sampled one;
* ``dial``: the model at the sampled dial;
* ``labels``: within the pass at the sampled dial, the routers are compared with labels measured there.

Gradients go through ``full``, ``dial`` and ``labels``; ``parent`` and ``second`` teach without any.
"""


@dataclass
class Outcome:
    """What the passes of a micro-batch gave, as far as they ran.

    Attributes:
        targets: (M,) int64, the token to be predicted at each scored position.
        found: By pass, log-probabilities (M, V) float32; of ``labels``, the routers' mean loss ().
    """

    targets: Tensor
    found: dict[Pass, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: Pass) -> Tensor:
        return self.found[name]


class Objective:
    """One loss that fine-tuning can minimise.

    Args:
        tuning: The recipe's ``finetune`` section.

    Attributes:
        metric: What the loss is called in ``metrics.jsonl``.
        reported: Whether it is also computed where it weighs nothing, if the passes that it needs run anyway.
        mean_over: The tokens that the loss is a mean over: ``scored`` ones, or ``all`` but padding.
        needs: The passes that it looks at; none where the recipe leaves it nothing to do.
    """

    metric: ClassVar[str]
    reported: ClassVar[bool] = False
    mean_over: ClassVar[Literal["scored", "all"]] = "scored"

    def __init__(self, tuning: FinetuneConfig) -> None:
        self.needs: frozenset[Pass] = frozenset()

    @property
    def student(self) -> Pass:
        """The pass whose backward pass its gradient is part of."""
        return "dial" if "dial" in self.needs else "full"

    def loss(self, outcome: Outcome) -> Tensor:
        """The loss () in nats, from the passes in :attr:`needs`."""
        raise NotImplementedError


def log_probabilities(logits: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities (M, V) float32 of ``logits`` (B, T, V) where ``mask`` (B, T - 1) says the next token counts."""
    return functional.log_softmax(logits[:, :-1][mask].float(), dim=-1)


def cross_entropy(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of ``log_probabilities`` (M, V) on ``targets`` (M,); 0 where M is 0."""
    return functional.nll_loss(log_probabilities, targets) if len(targets) else log_probabilities.sum()


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL(teacher || student) of log-probabilities (M, V), at temperature 1; 0 where M is 0.

    The teacher gets no gradient.
    """
    if not len(student):
        return student.sum()
    return functional.kl_div(student, teacher.detach(), log_target=True, reduction="batchmean")
