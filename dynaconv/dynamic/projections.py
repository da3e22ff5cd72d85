"""The projections of a stock FFN, however transformers stores them. D residual width, F FFN width.

Most are ``nn.Linear``. GPT-2's are ``Conv1D``, whose weight is (in, out); Phi-3 stores gate and up as one, the gate's
rows first. The kernels take (out, in), so they get views: nothing is copied, gradients and later changes come through.
A product with a transposed view is as fast in fp32; in bf16 it takes 1.1 to 1.6 times as long (one core, 1024 x 4096).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dynaconv.kernels.weights import FFNWeights

if TYPE_CHECKING:
    from dynaconv.dynamic.ffn import DynamicFFN


def projection(owner: nn.Module, name: str) -> Any:
    """The projection of ``owner`` called ``name``.

    Raises:
        TypeError: It is no dense layer, such as one with quantised weights.
    """
    module = owner.get_submodule(name)
    if not isinstance(_adapted(module), (nn.Linear, Conv1D)):
        raise TypeError(f"{name} is a {type(module).__name__}; a dynamic FFN needs Linear or Conv1D layers")
    return module


def ffn_weights(
    owner: nn.Module, gate: str | None, up: str, down: str, activation: Callable[[Tensor], Tensor]
) -> FFNWeights:
    """The network whose projections lie in ``owner`` under these names, as the kernels take it.

    Args:
        owner: The stock FFN, or the decoder layer where the projections lie in it directly.
        gate: Name of the gate projection; ``None`` without one, the same as ``up`` where both are stored as one.
        up: Name of the up projection.
        down: Name of the down projection.
        activation: The nonlinearity.
    """
    first, last = projection(owner, up), projection(owner, down)
    matrices: dict[str, Tensor | None] = {"up": _matrix(first), "up_bias": first.bias, "gate": None, "gate_bias": None}
    if gate == up:
        neurons = _matrix(last).shape[1]
        for name in ("up", "up_bias"):
            whole = matrices[name]
            if whole is not None:
                matrices[name.replace("up", "gate")], matrices[name] = whole[:neurons], whole[neurons:]
    elif gate is not None:
        other = projection(owner, gate)
        matrices |= {"gate": _matrix(other), "gate_bias": other.bias}
    return FFNWeights(down=_matrix(last), down_bias=last.bias, activation=activation, **matrices)  # type: ignore[arg-type]


def _matrix(module: Any) -> Tensor:
    """A projection's weight as (out, in), with what its adapters add."""
    weight: Tensor = module.weight
    for adapter in getattr(module, "active_adapters", ()):
        weight = weight + module.get_delta_weight(adapter)
    return weight.t() if isinstance(_adapted(module), Conv1D) else weight


def _adapted(module: nn.Module) -> nn.Module:
    """The layer itself, or the one that an adapter of the peft library wraps."""
    return getattr(module, "base_layer", module)


class Inline:
    """Mixin of a projection that leaves its part of an ungated FFN to a :class:`DynamicFFN`."""

    def project(self, x: Tensor) -> Tensor:
        """What the stock projection makes of ``x``."""
        return super().forward(x)  # type: ignore[misc]


class Opening(Inline):
    """Mixin of the up projection: computes the whole network.

    Attributes:
        network: The network.
    """

    network: DynamicFFN

    def forward(self, x: Tensor) -> Tensor:
        """Output (..., D) of the network for its input (..., D)."""
        return self.network(x)


class Passing(Inline):
    """Mixin of the down projection: hands on what the up projection has computed already."""

    def forward(self, x: Tensor) -> Tensor:
        """``x``."""
        return x


@cache
def inline_class(mixin: type[Inline], stock: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the projection class ``stock``: its tensors stay where they are."""
    return type(f"{mixin.__name__}{stock.__name__}", (mixin, stock), {"__module__": __name__})
