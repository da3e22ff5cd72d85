"""What a kernel needs to know of a feed-forward network: its matrices, biases and activation.

Ships with every exported model. Shapes: M tokens, D residual width, F neurons, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class FFNWeights(NamedTuple):
    """A feed-forward network in ``nn.Linear`` layout, gated or not.

    Gated: ``down(activation(gate(x)) * up(x))``. Not gated (``gate`` is None): ``down(activation(up(x)))``.
    A block of neurons is a slice of the rows of ``gate`` and ``up`` and of the columns of ``down``: nothing is
    repacked.

    Attributes:
        gate: ``(F, D)``, or None where the network has no gate.
        up: ``(F, D)``.
        down: ``(D, F)``.
        activation: Elementwise function; its result must not depend on the other elements.
        gate_bias: ``(F,)`` or None.
        up_bias: ``(F,)`` or None.
        down_bias: ``(D,)`` or None. A token that uses no block gets this, or zeros.
    """

    gate: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor
    activation: Callable[[torch.Tensor], torch.Tensor]
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @property
    def requires_grad(self) -> bool:
        """Whether any of the tensors wants a gradient."""
        return any(part.requires_grad for part in self if isinstance(part, torch.Tensor))
