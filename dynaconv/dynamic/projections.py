"""The projections of a stock FFN, however transformers stores them. D residual width, F FFN width.

Most are ``nn.Linear``. GPT-2's are ``Conv1D``, whose weight is (in, out); Phi-3 stores gate and up as one, the gate's
rows first. The kernels take (out, in), so they get views: nothing is copied, gradients and later changes come through.
A product with a transposed view is as fast in fp32; in bf16 it takes 1.1 to 1.6 times as long (one core, 1024 x 4096).

Kernels read weights; adapters (peft), offloading (accelerate) and parametrisations change what a *module* computes. So
:func:`is_plain` says whether a module is nothing but its weight. Where one is not, modules are called instead, and what
they compute is right by construction. Ships with every exported model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dynaconv.dynamic.per_thread import PerThread
from dynaconv.kernels.weights import FFNWeights

STOCK = {"Linear": nn.Linear, "Conv1D": Conv1D}
PLAIN: set[type[nn.Module]] = {*STOCK.values()}  # and what :func:`inline_class` makes of these


def projection(owner: nn.Module, name: str) -> Any:
    """The projection of ``owner`` called ``name``.

    Raises:
        TypeError: It is no dense layer, such as one with quantised weights.
    """
    module = owner.get_submodule(name)
    if not isinstance(innermost(module), tuple(STOCK.values())):
        raise TypeError(f"{name} is a {type(module).__name__}; a dynamic FFN needs dense Linear or Conv1D layers")
    return module


def innermost(module: Any) -> Any:
    """The projection that adapters (peft) are wrapped around; ``module`` itself where there are none."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def is_plain(module: nn.Module) -> bool:
    """Whether ``module`` computes what its weight and bias say, and nobody listens to its calls."""
    own_forward = "forward" in module.__dict__  # accelerate puts its hook there
    return type(module) in PLAIN and not (own_forward or module._forward_hooks or module._forward_pre_hooks)


def ffn_weights(
    owner: nn.Module, gate: str | None, up: str, down: str, activation: Callable[[Tensor], Tensor]
) -> FFNWeights:
    """The network whose projections, all plain, lie in ``owner`` under these names, as the kernels take it.

    Args:
        owner: The stock FFN, or the decoder layer where the projections lie in it directly.
        gate: Name of the gate projection; ``None`` without one, the same as ``up`` where both are stored as one.
        up: Name of the up projection.
        down: Name of the down projection.
        activation: The nonlinearity.
    """
    first, last = projection(owner, up), _matrix(projection(owner, down))
    matrices: dict[str, Tensor | None] = {"up": _matrix(first), "up_bias": stored(first, "bias"), "gate": None}
    matrices["gate_bias"] = None
    if gate == up:
        neurons = last.shape[1]
        for name in ("up", "up_bias"):
            whole = matrices[name]
            if whole is not None:
                matrices[name.replace("up", "gate")], matrices[name] = whole[:neurons], whole[neurons:]
    elif gate is not None:
        other = projection(owner, gate)
        matrices |= {"gate": _matrix(other), "gate_bias": stored(other, "bias")}
    down_bias = stored(projection(owner, down), "bias")
    return FFNWeights(down=last, down_bias=down_bias, activation=activation, **matrices)  # type: ignore[arg-type]


def stored(module: Any, name: str) -> Tensor | None:
    """A parameter of ``module`` by its name, also where accelerate keeps it elsewhere between calls.

    What is fetched remembers where from, as ``kept_as``: the same weights, though each time another tensor.
    """
    value: Tensor | None = getattr(module, name)
    hook: Any = getattr(innermost(module), "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        kept = getattr(one, "weights_map", None)
        if value is not None and value.is_meta and kept is not None:
            fetched: Tensor = kept[name].to(one.execution_device)
            fetched.kept_as = (id(kept), name)  # type: ignore[attr-defined]
            return fetched
    return value


def device_of(module: Any) -> torch.device:
    """Where a projection computes, also where accelerate keeps its weight elsewhere between calls."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is None:
        device = module.weight.device
    return torch.device("cpu") if str(device) == "meta" else torch.device(device)


def rebind(module: nn.Module) -> None:
    """Lets a module whose class was changed run its new forward where accelerate's hook kept the old one."""
    if "_old_forward" in module.__dict__:
        module._old_forward = type(module).forward.__get__(module)


def _matrix(module: Any) -> Tensor:
    """A projection's weight as (out, in)."""
    weight = stored(module, "weight")
    assert weight is not None
    return weight.t() if isinstance(module, Conv1D) else weight


class Handover(PerThread):
    """What the three modules of an ungated FFN tell each other within one forward pass.

    Attributes:
        finished: The up projection has computed the whole network: the others let its output pass.
        x: The FFN's input, where each of the three does its own part.
    """

    def __init__(self) -> None:
        self.finished = False
        self.x: Tensor | None = None


class Inline:
    """Mixin of a projection of an ungated FFN, whose modules transformers calls one by one.

    Attributes:
        network: The dynamic FFN it belongs to; held by the up projection only.
        handover: Shared by the modules of the FFN.
    """

    handover: Handover

    def project(self, x: Tensor) -> Tensor:
        """What the stock projection makes of ``x``."""
        return super().forward(x)  # type: ignore[misc]


class Opening(Inline):
    """Mixin of the up projection: computes the whole network, or its own part where others wrap a projection."""

    network: Any

    def forward(self, x: Tensor) -> Tensor:
        """Output (..., D) of the network for its input (..., D), or the up projection's (..., F)."""
        self.handover.finished, self.handover.x = False, None  # whatever a call that failed has left
        if self.network.in_one_piece():
            output: Tensor = self.network(x)
            self.handover.finished = True
            return output
        self.handover.x = x
        return self.project(x)


class Passing(Inline):
    """Mixin of the down projection: hands on what the up projection has computed already."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` where the network is finished, the down projection of it otherwise."""
        if self.handover.finished:
            self.handover.finished = False
            return x
        return self.project(x)


class Between(nn.Module):
    """Stands where the activation of an ungated FFN was: the activation, and what tokens leave out."""

    def __init__(self, activation: nn.Module, handover: Handover, select: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.activation, self.handover, self.select = activation, handover, select

    def forward(self, hidden: Tensor) -> Tensor:
        """``hidden`` where the network is finished, the activations (..., F) that are used otherwise."""
        x = self.handover.x
        if self.handover.finished or x is None:
            return hidden if self.handover.finished else self.activation(hidden)
        self.handover.x = None
        return self.select(x, self.activation(hidden))


@cache
def inline_class(mixin: type[Inline], stock: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the projection class ``stock``: its tensors stay where they are."""
    made = type(f"{mixin.__name__}{stock.__name__}", (mixin, stock), {"__module__": __name__})
    if stock in PLAIN:
        PLAIN.add(made)
    return made


def __getattr__(name: str) -> Any:
    """Classes of :func:`inline_class` by name, so that models pickle."""
    for mixin in (Opening, Passing):
        stock = STOCK.get(name.removeprefix(mixin.__name__))
        if stock is not None and name.startswith(mixin.__name__):
            return inline_class(mixin, stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
