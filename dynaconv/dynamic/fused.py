"""Router and FFN in one kernel, where tokens use single neurons and nobody asks what else. Ships with every model.

Reading a policy's thresholds instead of its choice is all that differs from the long way, which :class:`DynamicFFN`
goes whenever something here does not fit: a recorder, gradients, adapters, compiled code, no kernel that runs.

B sequences, T tokens, D residual width, F neurons, G sets of means.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynaconv.dynamic.controller import Controlled
from dynaconv.dynamic.few_bits import version
from dynaconv.dynamic.policy import ByThreshold, by_sequence
from dynaconv.dynamic.routers.sketch import SketchRouter
from dynaconv.kernels.dispatch import sketched_backend
from dynaconv.kernels.sketched import Asked, SketchedFFN


class _Watched(NamedTuple):
    """A projection, where it hangs, and its parameters with the versions they had."""

    around: nn.Module
    name: str
    module: nn.Module
    parameters: tuple[tuple[str, Tensor, int], ...]

    def unchanged(self) -> bool:
        module = self.module
        if self.around._modules.get(self.name) is not module or "forward" in module.__dict__:
            return False
        if module._forward_hooks or module._forward_pre_hooks:
            return False
        own = module._parameters
        return all(own.get(name) is value and version(value) == known for name, value, known in self.parameters)


class _Mixed(NamedTuple):
    """Means of one call: what they were made from, what neurons give that are off, and what that adds up to.

    It keeps what it was made from, whose memory is then nobody else's.
    """

    means: Tensor
    sets: Tensor
    versions: tuple[int, int]
    mean: Tensor
    base: Tensor


class Fused:
    """What one site keeps for fused kernels."""

    def __init__(self) -> None:
        self._ffn: SketchedFFN | None = None
        self._watched: tuple[_Watched, ...] = ()
        self._mixed: _Mixed | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # made again, from the weights that it will be used with

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def output(self, site: Any, x: Tensor) -> Tensor | None:
        """What the FFN gives for inputs ``x`` (..., D); ``None`` where this is not the way.

        Args:
            site: The dynamic FFN.
            x: Its inputs.
        """
        policy, router = site.call.policy, site.router
        if not isinstance(router, SketchRouter) or site.packed or site.call.recorder is not None:
            return None
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        held = policy.policy if isinstance(policy, Controlled) else policy
        if not isinstance(held, ByThreshold) or not self._follows(site):
            return None
        ffn, rows = self._ffn, x.reshape(-1, x.shape[-1])
        assert ffn is not None
        backend = sketched_backend(ffn, rows)
        if backend is None:
            return None

        def levels(thresholds: Tensor) -> Tensor:
            level = router.level(policy.of_site(thresholds, site.site, x))
            return level if level.dim() == 0 else level.expand(x.shape[:-1]).reshape(-1)

        exact = None if held.exact is None else levels(held.exact)
        mean, base = self._means(held.means, site.means, ffn.weights.down, x)
        output, counts = backend.run(ffn, rows, Asked(levels(held.thresholds), exact, mean, base))
        if isinstance(policy, Controlled):
            policy.observe_counts(counts, site.site.partition.neurons)
        return output.view_as(x)

    def _follows(self, site: Any) -> bool:
        """Whether kernels may read the weights; then they are given them as they are now."""
        if self._watched and site.copy.made and all(watched.unchanged() for watched in self._watched):
            return True
        self._watched, self._mixed = (), None
        if not site.is_plain():
            return False
        site.prepare()
        self._ffn = site.router.sketched(site.weights(), site.activation_name)
        self._watched = tuple(_watched(*place) for place in site.places())
        return True

    def _means(
        self, means: Tensor | None, sets: Tensor | None, down: Tensor, x: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """What the tokens' neurons give that are off, (F,) or (M, F), and what that adds up to, (D,) or (M, D)."""
        if means is None or sets is None:
            return None, None
        versions, known = (version(means), version(sets)), self._mixed
        if known is None or known.means is not means or known.sets is not sets or known.versions != versions:
            mean = means.to(sets) @ sets
            known = self._mixed = _Mixed(means, sets, versions, mean, mean @ down.t().to(mean.dtype))
        if known.mean.dim() == 1:
            return known.mean, known.base
        mean, base = (by_sequence(one, x).expand(*x.shape[:-1], -1).flatten(0, -2) for one in (known.mean, known.base))
        return mean, base


def _watched(owner: nn.Module, path: str) -> _Watched:
    around, _, name = path.rpartition(".")
    parent = owner.get_submodule(around)
    module = parent._modules[name]
    assert module is not None
    parameters = [(each, value, version(value)) for each, value in module._parameters.items() if value is not None]
    return _Watched(parent, name, module, tuple(parameters))
