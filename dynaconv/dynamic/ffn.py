"""A feed-forward network used block by block. B batch, T tokens, D residual width, F FFN width, N blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dynaconv.dynamic.context import current_policy, current_trace
from dynaconv.dynamic.layout import FFNLayout, RouterLayout
from dynaconv.dynamic.projections import Inline, Opening, Passing, ffn_weights, inline_class, projection
from dynaconv.dynamic.router import Router
from dynaconv.kernels.dispatch import nested_ffn, routed_ffn
from dynaconv.kernels.reference import bit_masks
from dynaconv.kernels.weights import FFNWeights


class DynamicFFN(nn.Module):
    """Computes with the projections of a stock module, which keep their names, so tensor names stay the parent's.

    Without a policy, or at the full dial, it computes what the stock module computes. :meth:`install` puts it to work.

    Args:
        owner: The stock FFN, or the decoder layer where the projections lie in it directly.
        layer: Index of the decoder layer.
        edges: N + 1 neuron positions of the blocks.
        ffn: Names of the projections.
        activation: The nonlinearity.
        router: What the router is.
    """

    def __init__(
        self,
        owner: nn.Module,
        *,
        layer: int,
        edges: Sequence[int],
        ffn: FFNLayout,
        activation: Callable[[Tensor], Tensor],
        router: RouterLayout,
    ) -> None:
        super().__init__()
        self.layer, self.edges, self.blocks, self.names = layer, tuple(edges), len(edges) - 1, ffn
        self.activation = activation
        self._owner = [owner]  # in a list: no submodule
        up = self.weights().up
        with torch.device(up.device):
            self.router = Router(up.shape[1], edges, router)
        self.train(owner.training)

    def install(self, model: nn.Module) -> None:
        """Takes the place of its stock FFN in ``model``.

        A gated FFN is replaced as a whole. One without a gate is three modules in a row, with what differs by family
        around them (dropout; with OPT, the decoder layer itself), so it keeps its place: its up projection computes
        everything, activation and down projection let that pass.
        """
        path, owner = self.names.path.format(layer=self.layer), self._owner[0]
        if self.names.gate is None:
            setattr(owner, _activation_name(owner, self.activation), nn.Identity())
            projection(owner, self.names.up).network = self
            for mixin, name in ((Opening, self.names.up), (Passing, self.names.down)):
                module: nn.Module = projection(owner, name)
                module.__class__ = inline_class(mixin, type(module))  # type: ignore[arg-type]
            return
        for name in dict.fromkeys((self.names.gate, self.names.up, self.names.down)):
            self.add_module(name, projection(owner, name))
        self._owner = [self]
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, self)

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

    def forward(self, x: Tensor) -> Tensor:
        """Output for inputs (B, T, D), using of each token what the call's policy decides; OPT's are (B * T, D)."""
        policy, trace = current_policy(), current_trace()
        choice = policy.decide(self, x) if policy is not None else None
        if choice is not None and getattr(policy, "scores_only", False):
            return choice
        if trace is not None:
            trace.add(self.layer, self._widths(choice, x))
        if choice is None:
            return self._project(self.names.down, self.hidden(x))
        if choice.is_floating_point() or torch.is_grad_enabled():
            return self._masked(policy, choice, x)
        rows = x.reshape(-1, x.shape[-1])
        if choice.dtype == torch.bool:
            masks = bit_masks(choice.reshape(-1, self.blocks))
            return routed_ffn(rows, masks, self.weights(), self.edges).view_as(x)
        return nested_ffn(rows, choice.reshape(-1), self.weights(), self.edges).view_as(x)

    def weights(self) -> FFNWeights:
        """The projections as the kernels take them."""
        names = self.names
        return ffn_weights(self._owner[0], names.gate, names.up, names.down, self.activation)

    def projections(self) -> list[nn.Module]:
        """The stock projections it computes with."""
        names = (self.names.gate, self.names.up, self.names.down)
        return [projection(self._owner[0], name) for name in dict.fromkeys(names) if name is not None]

    def _project(self, name: str, x: Tensor) -> Tensor:
        module = projection(self._owner[0], name)
        return module.project(x) if isinstance(module, Inline) else module(x)

    def _masked(self, policy: object, choice: Tensor, x: Tensor) -> Tensor:
        """All neurons computed, those of unused blocks multiplied away: what training runs, gradients included."""
        h = self.hidden(x)
        observe = getattr(policy, "observe", None)
        if observe is not None:
            observe(self, x, h)
        on = choice
        if choice.dtype == torch.int64:
            on = choice[..., None] > torch.arange(self.blocks, device=x.device)
        return self._project(self.names.down, _multiplied(h, on.to(h.dtype), self.edges))

    def _widths(self, choice: Tensor | None, x: Tensor) -> Tensor:
        if choice is None:
            return torch.full(x.shape[:-1], self.blocks, dtype=torch.int64, device=x.device)
        return choice if choice.dtype == torch.int64 else (choice > 0.5).sum(-1)


def _multiplied(h: Tensor, on: Tensor, edges: Sequence[int]) -> Tensor:
    """Activations ``h`` (..., F), each block times its entry of ``on`` (..., N)."""
    sizes = [b - a for a, b in itertools.pairwise(edges)]
    if len(set(sizes)) == 1:
        return (h.unflatten(-1, (len(sizes), sizes[0])) * on[..., None]).flatten(-2)
    return torch.cat([block * share for block, share in zip(h.split(sizes, -1), on.split(1, -1), strict=True)], -1)


def _activation_name(owner: nn.Module, activation: Callable[[Tensor], Tensor]) -> str:
    """What ``owner`` calls its nonlinearity.

    Raises:
        ValueError: It has none like ``activation``, or several.
    """
    names = [name for name, child in owner.named_children() if type(child) is type(activation)]
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise ValueError(f"{type(owner).__name__} must have one {type(activation).__name__}; found: {found}")
    return names[0]
