"""A feed-forward network used block by block. Ships with every exported model.

B sequences, T tokens, D residual width, F FFN width, N blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv.dynamic.call import Call
from dynaconv.dynamic.cost import FFNCost, FFNShape, ffn_cost
from dynaconv.dynamic.few_bits import FewBitCopy
from dynaconv.dynamic.fused import Fused
from dynaconv.dynamic.layout import FFNLayout
from dynaconv.dynamic.policy import Decision, Full, by_sequence
from dynaconv.dynamic.projections import (
    Between,
    Handover,
    Inline,
    Opening,
    Passing,
    device_of,
    ffn_weights,
    inline_class,
    innermost,
    is_plain,
    projection,
    rebind,
    stored,
)
from dynaconv.dynamic.recorder import Record
from dynaconv.dynamic.routers.base import Router
from dynaconv.dynamic.routers.sketch import SketchRouter
from dynaconv.dynamic.site import Site
from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Choice, Soft, Subset
from dynaconv.kernels.dispatch import blocked_ffn
from dynaconv.kernels.op import compiled_ffn, register_activation
from dynaconv.kernels.reference import blocked_ffn as reference_ffn
from dynaconv.kernels.reference import select
from dynaconv.kernels.weights import FFNWeights


class DynamicFFN(nn.Module):
    """Computes with the projections of a stock module, which keep their names, so tensor names stay the parent's.

    Outside of a call, or at the full dial, it computes what the stock module computes. :meth:`install` puts it to work.

    Args:
        owner: The stock FFN, or the decoder layer where the projections lie in it directly.
        site: Which one it is, and its blocks.
        names: Of the projections.
        activation: The nonlinearity.
        activation_name: What ``config.json`` calls it.
        router: Makes the site's router, from D.
        call: Of the model it belongs to.
        copy: Makes the few-bit copy of the weights, where the router or low-bit values need one.
        means: Sets of means of neurons that are off, G; 0 where such neurons give nothing.
        itemsize: Bytes of a weight in the checkpoint.

    Attributes:
        means: ``(G, F)``, what each neuron gives where it is off; policies weigh the sets.
        hooks_only_move_weights: Whether hooks of the projections of an ungated FFN compute nothing, as ZeRO 3's, which
            gather weights: then they need not be called, and the FFN is computed in one piece all the same.
    """

    hooks_only_move_weights = False

    _owner: nn.Module
    _between: Between

    def __init__(
        self,
        owner: nn.Module,
        *,
        site: Site,
        names: FFNLayout,
        activation: nn.Module,
        activation_name: str,
        router: Callable[[int], Router],
        call: Call,
        copy: FewBitCopy | None = None,
        means: int = 0,
        itemsize: int = 4,
    ) -> None:
        super().__init__()
        self.site, self.names, self.call, self.activation = site, names, call, activation
        self.copy, self.itemsize = copy, itemsize
        self.fused = Fused()
        self._packed: FFNWeights | None = None
        object.__setattr__(self, "_owner", owner)  # not a submodule: it owns this module
        self.activation_name = activation_name
        register_activation(activation_name, activation)
        up = innermost(projection(owner, names.up))
        self.residual = up.weight.shape[1 if isinstance(up, nn.Linear) else 0]
        with torch.device(device_of(up)):
            self.router = router(self.residual)
            self.means = nn.Parameter(torch.zeros(means, site.partition.neurons)) if means else None
        self.train(owner.training)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        register_activation(self.activation_name, self.activation)  # it may be another process

    def install(self, model: nn.Module) -> None:
        """Takes the place of its stock FFN in ``model``.

        A gated FFN is replaced as a whole. One without a gate is three modules in a row, with what differs by family
        around them (dropout; with OPT, the decoder layer itself), so they keep their places: as long as nothing wraps
        them, the up projection computes everything, activation and down projection let that pass.
        """
        if self.names.gate is None:
            self._install_inline()
            return
        owner = self._owner
        for name in dict.fromkeys((self.names.gate, self.names.up, self.names.down)):
            self.add_module(name, projection(owner, name))
        object.__setattr__(self, "_owner", self)
        hooked = owner.__dict__.get("forward")
        if isinstance(hooked, functools.partial):  # accelerate's hook of the stock FFN moves over
            self._hf_hook, self._old_forward = owner._hf_hook, self.forward
            self.forward = functools.partial(hooked.func, self)  # type: ignore[method-assign]
        parent, _, name = self.names.path.format(layer=self.site.index).rpartition(".")
        setattr(model.get_submodule(parent), name, self)

    def _install_inline(self) -> None:
        owner, handover = self._owner, Handover()
        name = _activation_name(owner, self.activation)
        between = Between(owner.get_submodule(name), handover, self.select)
        setattr(owner, name, between)
        object.__setattr__(self, "_between", between)  # not a submodule: the owner's
        innermost(projection(owner, self.names.up)).network = self
        for mixin, name in ((Opening, self.names.up), (Passing, self.names.down)):
            module = innermost(projection(owner, name))  # adapters come and go around it
            module.__class__ = inline_class(mixin, type(module))  # type: ignore[arg-type]
            module.handover = handover
            rebind(module)

    def forward(self, x: Tensor, *, scores_only: bool = False) -> Tensor:
        """Output for inputs (B, T, D), using of each token what the call's policy decides; OPT's are (B * T, D).

        Args:
            x: Inputs.
            scores_only: Return the router's scores instead. A call of this module, since ZeRO 3 gathers weights by
                calls.
        """
        if scores_only:
            return self._scores(x)
        if self._packed is not None and self._packed.up.device != x.device:
            self._move_packed(x.device)
        fused = self.fused.output(self, x)
        if fused is not None:
            return fused
        decision = self._decide(x)
        choice = decision.choice
        if self._packed is not None:
            return self._low_bit_only(x, decision)
        if choice is None or not self._reads_weights(choice):
            return self._project(self.names.down, self._used(x, self.hidden(x), decision))
        rows, ffn = x.reshape(-1, x.shape[-1]), self.blocked(decision, x)
        if self._observed() or torch.is_grad_enabled():
            self._record(x, decision, self.hidden(x) if self._observed() else None)
            return reference_ffn(ffn, rows, choice.rows()).view_as(x)
        self._record(x, decision)
        if not torch.compiler.is_compiling():
            return blocked_ffn(ffn, rows, choice.rows()).view_as(x)
        if ffn.low is None and ffn.mean is None:
            return compiled_ffn(ffn, rows, choice.rows(), self.activation_name).view_as(x)
        return reference_ffn(ffn, rows, choice.rows()).view_as(x)

    def select(self, x: Tensor, hidden: Tensor) -> Tensor:
        """What the call's policy keeps of the activations (..., F) of FFN inputs ``x`` (..., D)."""
        return self._used(x, hidden, self._decide(x))

    def hidden(self, x: Tensor) -> Tensor:
        """Activations of all neurons, (..., F), for inputs (..., D)."""
        up = self._project(self.names.up, x)
        if self.names.gate is None:
            return self.activation(up)
        if self.names.gate == self.names.up:
            gate, up = up.chunk(2, dim=-1)
        else:
            gate = self._project(self.names.gate, x)
        return self.activation(gate) * up

    def blocked(self, decision: Decision | None = None, x: Tensor | None = None) -> BlockedFFN:
        """The network as the kernels take it, for what was decided of tokens ``x``; its projections must be plain."""
        weights, low, mean = self.weights(), None, None
        if decision is not None and x is not None:
            mean = self._mean_of_rows(decision, x)
            if isinstance(decision.choice, Subset) and decision.choice.exact is not None and self.copy is not None:
                low = self.copy.low(weights)  # of the copy that the router has just read
        return BlockedFFN(weights, self.site.partition, low, mean)

    def pack(self) -> None:
        """Keeps the low-bit values alone, and lets go of the weights: from here on they stand for exact ones.

        Raises:
            ValueError: The model has no low-bit values.
        """
        if self.copy is None or not self.copy.layout.values:
            raise ValueError("this model has no low-bit values: convert it with experts=neurons sketch.values=mixed")
        weights = self.weights()
        self.copy.pack(weights)
        self._packed = FFNWeights(
            gate=None if weights.gate is None else weights.gate.new_empty(0),
            up=weights.up.new_empty(0),
            down=weights.down.new_empty(0),
            activation=weights.activation,
            gate_bias=_own(weights.gate_bias),
            up_bias=_own(weights.up_bias),
            down_bias=_own(weights.down_bias),
        )
        for module in map(innermost, self.projections()):
            module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)

    def _move_packed(self, device: torch.device) -> None:
        assert self.copy is not None and self._packed is not None
        self.copy.move(device)
        parts = (one.to(device) if isinstance(one, Tensor) else one for one in self._packed)
        self._packed = FFNWeights(*parts)  # type: ignore[arg-type]

    def _low_bit_only(self, x: Tensor, decision: Decision) -> Tensor:
        assert self.copy is not None
        partition, choice, rows = self.site.partition, decision.choice, x.reshape(-1, x.shape[-1])
        if choice is None:
            all_on = torch.ones(*x.shape[:-1], partition.blocks, dtype=torch.bool, device=x.device)
            choice = Subset(all_on, closer=all_on)
        if isinstance(choice, Subset):
            self._record(x, decision._replace(choice=replace(choice, exact=torch.zeros_like(choice.on))))
            choice = replace(choice, exact=None)
        ffn = BlockedFFN(self.copy.low(self.weights()), partition, None, self._mean_of_rows(decision, x))
        return reference_ffn(ffn, rows, choice.rows()).view_as(x)

    def weights(self) -> FFNWeights:
        """The weights of its projections, without what adapters add; of a packed FFN, biases alone."""
        if self._packed is not None:
            return self._packed
        names = self.names
        return ffn_weights(self._owner, names.gate, names.up, names.down, self.activation)

    @functools.cached_property
    def cost(self) -> FFNCost:
        """What a token's use of it costs, the router counted."""
        weights = self.weights()
        biases = sum(
            bias.numel() for bias in (weights.gate_bias, weights.up_bias, weights.down_bias) if bias is not None
        )
        inputs = 1 if weights.gate is None else 2
        shape = FFNShape(self.residual, self.site.partition.neurons, inputs, self.itemsize, biases)
        router: tuple[float, float] = self.router.bytes_per_token, self.router.flops_per_token
        closer = low = (0.0, 0.0)
        if self.copy is not None:
            low = self.copy.low_cost(shape) if self.copy.layout.values else low
            router, closer = self.copy.first_cost(shape), self.copy.second_cost(shape)
        return ffn_cost(shape, router=router, closer=closer, low=low, means=self.means is not None)

    def own_state(self) -> dict[str, Tensor]:
        """Tensors that the stock FFN does not have, by name: the router's, and the means."""
        own = {f"router.{name}": value for name, value in self.router.state_dict(keep_vars=True).items()}
        return own if self.means is None else own | {"means": self.means}

    def places(self) -> list[tuple[nn.Module, str]]:
        """Where its projections hang: the module, and the name below it."""
        names = (self.names.gate, self.names.up, self.names.down)
        return [(self._owner, name) for name in dict.fromkeys(names) if name is not None]

    def projections(self) -> list[nn.Module]:
        """The stock projections it computes with."""
        return [projection(*place) for place in self.places()]

    @property
    def packed(self) -> bool:
        """Whether it holds low-bit values alone."""
        return self._packed is not None

    def is_plain(self) -> bool:
        """Whether its projections compute what their weights say, so that kernels may read these."""
        return all(map(is_plain, self.projections()))

    def in_one_piece(self) -> bool:
        """Whether nothing wraps the modules of an ungated FFN or listens to them, so that one may compute it all."""
        if not all(isinstance(module, Inline) for module in self.projections()):
            return False
        return self.hooks_only_move_weights or not any(map(_overheard, (*self.projections(), self._between)))

    def _decide(self, x: Tensor) -> Decision:
        policy = self.call.policy
        if policy is None:
            return Decision(None)
        if not isinstance(policy, Full) or policy.scored:
            self.prepare()
        return policy.decide(self.site, self.router, x)

    def _scores(self, x: Tensor) -> Tensor:
        self.prepare()
        return self.router(x)

    def prepare(self) -> None:
        """Lets a sketch router, and the few-bit copy that it reads, see the weights as they are now."""
        if not isinstance(self.router, SketchRouter) or self.copy is None:
            return
        weights = self.weights()
        if torch.compiler.is_compiling():
            self._copy_for_compiled_code()
        else:
            self.copy.follow(weights)
        self.router.follow(self.copy, weights)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _copy_for_compiled_code(self) -> bool:
        """Runs while code is compiled, and not in compiled code."""
        copy, weights = self.copy, self.weights()
        assert copy is not None
        copy.follow(weights)
        dtype = weights.up.dtype
        _ = copy.first(dtype), copy.second(dtype), copy.layout.values and copy.low(weights)  # decoded here, and kept
        return True

    def _mean(self, decision: Decision, x: Tensor) -> Tensor | None:
        """What neurons give that are off, (F,), or (B, 1, F) where sequences differ."""
        means = stored(self, "means")
        if decision.means is None or means is None:
            return None
        mean = decision.means.to(means) @ means
        return mean if mean.dim() == 1 else by_sequence(mean, x)

    def _mean_of_rows(self, decision: Decision, x: Tensor) -> Tensor | None:
        """The same for the tokens of ``x`` in one dimension, (F,) or (M, F)."""
        mean = self._mean(decision, x)
        return mean if mean is None or mean.dim() == 1 else mean.expand(*x.shape[:-1], -1).reshape(-1, mean.shape[-1])

    def _observed(self) -> bool:
        recorder = self.call.recorder
        return recorder is not None and recorder.wants_hidden

    def _reads_weights(self, choice: Choice) -> bool:
        """Whether the weights say what the projections compute, so that these need not be called, as in training."""
        if isinstance(choice, Subset) and choice.exact is not None:  # low-bit values are made from weights
            inline = all(isinstance(module, Inline) for module in self.projections())
            return self.is_plain() or (self.hooks_only_move_weights and inline)
        return not (self._observed() or torch.is_grad_enabled() or isinstance(choice, Soft)) and self.is_plain()

    def _used(self, x: Tensor, hidden: Tensor, decision: Decision) -> Tensor:
        if isinstance(decision.choice, Subset):  # modules compute exact values, also where low-bit ones would do
            decision = decision._replace(choice=replace(decision.choice, exact=None))
        self._record(x, decision, hidden)
        if decision.choice is None:
            return hidden
        return select(hidden, decision.choice, self.site.partition, self._mean(decision, x))

    def _record(self, x: Tensor, decision: Decision, hidden: Tensor | None = None) -> None:
        recorder = self.call.recorder
        if recorder is not None:
            recorder.record(Record(self.site, x, decision.choice, decision.scores, hidden, self.cost))

    def _project(self, name: str, x: Tensor) -> Tensor:
        module = projection(self._owner, name)
        return module.project(x) if isinstance(module, Inline) else module(x)


def _own(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().clone()


def _overheard(module: nn.Module) -> bool:
    return "forward" in module.__dict__ or bool(module._forward_hooks or module._forward_pre_hooks)


def _activation_name(owner: nn.Module, activation: nn.Module) -> str:
    """What ``owner`` calls its nonlinearity.

    Raises:
        ValueError: It has none like ``activation``, or several.
    """
    names = [name for name, child in owner.named_children() if type(child) is type(activation)]
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise ValueError(f"{type(owner).__name__} must have one {type(activation).__name__}; found: {found}")
    return names[0]
