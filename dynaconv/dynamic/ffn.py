"""A feed-forward network used block by block. B batch, T tokens, D residual width, F FFN width, N blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dynaconv.dynamic.context import current_policy, current_trace
from dynaconv.dynamic.layout import FFNLayout, RouterLayout
from dynaconv.dynamic.router import Router
from dynaconv.kernels.dispatch import nested_ffn
from dynaconv.kernels.weights import FFNWeights


class DynamicFFN(nn.Module):
    """Takes a stock FFN's place and owns its projections under their own names, so tensor names stay the parent's.

    Without a policy, or at the full dial, it computes what the stock module computes.

    Args:
        stock: The module whose place it takes.
        layer: Index of the decoder layer.
        edges: N + 1 neuron positions; width n uses neurons [0, edges[n]).
        ffn: Names of the projections.
        activation: The nonlinearity.
        router: What the router is.
    """

    def __init__(
        self,
        stock: nn.Module,
        *,
        layer: int,
        edges: Sequence[int],
        ffn: FFNLayout,
        activation: Callable[[Tensor], Tensor],
        router: RouterLayout,
    ) -> None:
        super().__init__()
        self.layer, self.edges, self.blocks, self.names = layer, tuple(edges), len(edges) - 1, ffn
        for name in (ffn.gate, ffn.up, ffn.down):
            if name is not None:
                self.add_module(name, stock.get_submodule(name))
        self.activation = activation
        device = self.projection(ffn.down).weight.device
        with torch.device(device):
            self.router = Router(self.projection(ffn.up).in_features, edges, router)
        self.train(stock.training)

    def projection(self, name: str) -> nn.Linear:
        """The projection called ``name``."""
        module = self.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module

    def hidden(self, x: Tensor) -> Tensor:
        """Activations of all neurons, (B, T, F), for inputs (B, T, D)."""
        up = self.get_submodule(self.names.up)(x)
        if self.names.gate is None:
            return self.activation(up)
        return self.activation(self.get_submodule(self.names.gate)(x)) * up

    def forward(self, x: Tensor) -> Tensor:
        """Output (B, T, D) for inputs (B, T, D), using of each token what the call's policy decides."""
        policy, trace = current_policy(), current_trace()
        choice = policy.decide(self, x) if policy is not None else None
        if trace is not None:
            trace.add(self.layer, self._widths(choice, x))
        if choice is None:
            return self.get_submodule(self.names.down)(self.hidden(x))
        if choice.is_floating_point() or torch.is_grad_enabled():
            return self._masked(policy, choice, x)
        rows, widths = x.reshape(-1, x.shape[-1]), choice.reshape(-1)
        return nested_ffn(rows, widths, self.weights(), self.edges).view_as(x)

    def weights(self) -> FFNWeights:
        """The projections as the kernels take them."""
        gate = self.projection(self.names.gate) if self.names.gate is not None else None
        up, down = self.projection(self.names.up), self.projection(self.names.down)
        return FFNWeights(
            gate=gate.weight if gate is not None else None,
            up=up.weight,
            down=down.weight,
            gate_bias=gate.bias if gate is not None else None,
            up_bias=up.bias,
            down_bias=down.bias,
            activation=self.activation,
        )

    def _masked(self, policy: object, choice: Tensor, x: Tensor) -> Tensor:
        """All neurons computed, those of unused blocks multiplied away: what training runs, gradients included."""
        h = self.hidden(x)
        observe = getattr(policy, "observe", None)
        if observe is not None:
            observe(self, x, h)
        on = choice
        if not choice.is_floating_point():
            on = choice[..., None] > torch.arange(self.blocks, device=x.device)
        sizes = torch.tensor([b - a for a, b in zip(self.edges, self.edges[1:], strict=False)], device=x.device)
        neurons = on.to(h.dtype).repeat_interleave(sizes, dim=-1, output_size=self.edges[-1])
        return self.get_submodule(self.names.down)(h * neurons)

    def _widths(self, choice: Tensor | None, x: Tensor) -> Tensor:
        if choice is None:
            return torch.full(x.shape[:-1], self.blocks, dtype=torch.int64, device=x.device)
        return (choice > 0.5).sum(-1) if choice.is_floating_point() else choice
