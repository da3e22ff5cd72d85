"""Router and FFN in one kernel, where tokens use single neurons and nobody asks what else. Ships with every model.

Reading a policy's thresholds instead of its choice is all that differs from the long way, which :class:`DynamicFFN`
goes whenever something here does not fit: a recorder, gradients, adapters, compiled code, no kernel that runs.

B sequences, T tokens, D residual width, F neurons, G sets of means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynaconv.dynamic.controller import Controlled
from dynaconv.dynamic.few_bits import FewBitCopy
from dynaconv.dynamic.policy import ByThreshold, by_sequence
from dynaconv.dynamic.routers.sketch import SketchRouter
from dynaconv.kernels.dispatch import sketched_backend
from dynaconv.kernels.sketched import Asked, SketchedBackend, SketchedFFN
from dynaconv.kernels.weights import FFNWeights


class _Mixed(NamedTuple):
    """Means of one call: what they were made from, what neurons give that are off, and what that adds up to."""

    made_from: tuple[Any, ...]
    mean: Tensor
    base: Tensor


class Fused:
    """What one site keeps for fused kernels."""

    def __init__(self) -> None:
        self._ffn: SketchedFFN | None = None
        self._made_from: tuple[Any, ...] = ()
        self._mixed: _Mixed | None = None
        self._watched: list[tuple[nn.Module, Tensor, int]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {}  # made again, from the weights that it will be used with

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def watch(self, modules: Sequence[nn.Module]) -> None:
        """Remembers the projections as they are now, which the FFN was made from."""
        self._watched = [(module, module.weight, module.weight._version) for module in modules]  # type: ignore[misc]

    def unchanged(self) -> bool:
        """Whether the projections still are what they were; costs less than to look at everything anew."""
        return bool(self._watched) and all(
            module._parameters["weight"] is weight
            and weight._version == version
            and not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
            for module, weight, version in self._watched
        )

    def ready(
        self, x: Tensor, weights: Callable[[], FFNWeights], activation: str, copy: FewBitCopy, router: SketchRouter
    ) -> tuple[SketchedFFN, SketchedBackend] | None:
        """The FFN as kernels take it, and the one that runs for tokens ``x`` (M, D); ``None`` where none does.

        Args:
            x: The tokens.
            weights: Gives the weights, where they are not known, after their copy has been made.
            activation: What ``config.json`` calls the nonlinearity.
            copy: The few-bit copy.
            router: The site's.
        """
        made_from = (copy.version, router.offset._version, router.up_mean._version)
        if self._ffn is None or made_from != self._made_from:
            self._ffn, self._mixed = router.sketched(weights(), activation), None
            self._made_from = made_from
        backend = sketched_backend(self._ffn, x)
        return None if backend is None else (self._ffn, backend)

    def asked(
        self, thresholds: Tensor, exact: Tensor | None, means: Tensor | None, x: Tensor, router: SketchRouter,
        sets: Tensor | None, down: Tensor,
    ) -> Asked:  # fmt: skip
        """What kernels are asked.

        Args:
            thresholds: Of the tokens ``x``, broadcastable to (B, T).
            exact: Those of exact values.
            means: Weights of the sets, (G,) or (B, G).
            x: ``(B, T, D)``, or (B * T, D).
            router: The site's.
            sets: ``(G, F)``.
            down: ``(D, F)``.
        """

        def levels(values: Tensor) -> Tensor:
            level = router.level(values)
            return level if level.dim() == 0 else level.expand(x.shape[:-1]).reshape(-1)

        mean = base = None
        if means is not None and sets is not None:
            mean, base = self._means(means, sets, down)
            if mean.dim() == 2:
                mean, base = (by_sequence(one, x).expand(*x.shape[:-1], -1).flatten(0, -2) for one in (mean, base))
        return Asked(levels(thresholds), None if exact is None else levels(exact), mean, base)

    def _means(self, means: Tensor, sets: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        made_from = (means.data_ptr(), means._version, means.shape, sets.data_ptr(), sets._version)
        if self._mixed is None or self._mixed.made_from != made_from:
            mean = means.to(sets) @ sets
            self._mixed = _Mixed(made_from, mean, mean @ down.t().to(mean.dtype))
        return self._mixed.mean, self._mixed.base


def thresholds_of(policy: Any, site: Any, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """Thresholds, those of exact values, and weights of means that ``policy`` has for tokens ``x``.

    ``None`` where it decides by something else.
    """
    held = policy.policy if isinstance(policy, Controlled) else policy
    if not isinstance(held, ByThreshold):
        return None
    exact = None if held.exact is None else policy.of_site(held.exact, site, x)
    return policy.of_site(held.thresholds, site, x), exact, held.means


def inference(x: Tensor) -> bool:
    """Whether nothing is compiled, and no gradients are recorded."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())
