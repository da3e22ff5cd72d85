"""Which router kind a recipe trains, and how it is built. D residual width."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator

from dynaconv.config import FinetuneConfig, RunConfig
from dynaconv.dynamic.layout import RouterLayout
from dynaconv.dynamic.routers.base import Router
from dynaconv.dynamic.routers.kinds import KINDS
from dynaconv.dynamic.routers.uniform import UniformRouter

AUTO_ROUTER, NO_ROUTER = "auto", "uniform"  # the kind that fits the experts; the same width for every token
RENAMED = {"gate": "width"}


def choices(experts: str) -> list[str]:
    """What ``finetune.router`` may be for such ``experts``."""
    kinds = [name for name, kind in KINDS.items() if kind.experts == experts and kind.objective != "none"]
    same_width = [NO_ROUTER] if experts == "nested" else []  # routed experts have no first blocks
    return [AUTO_ROUTER, *kinds, *same_width]


def problems_of_router(config: RunConfig) -> Iterator[str]:
    """A sentence where ``finetune.router`` is no kind of router, or one for other experts."""
    router, fitting = config.finetune.router, choices(config.experts)
    if router in fitting:
        return
    near = difflib.get_close_matches(router, fitting, n=1)
    hint = f" ({near[0]!r}?)" if near else ""
    if router in RENAMED:
        hint = f" ({router!r} is called {RENAMED[router]!r} now; {AUTO_ROUTER!r} takes what fits the experts)"
    wanted = f"one of {', '.join(fitting)} where experts is {config.experts!r}"
    yield f"finetune.router is {router!r}; it must be {wanted}{hint}"


def router_kind(tuning: FinetuneConfig, experts: str) -> type[Router]:
    """The kind that ``finetune.router`` asks for, of such ``experts``."""
    if tuning.router == NO_ROUTER:
        return UniformRouter
    if tuning.router != AUTO_ROUTER:
        return KINDS[tuning.router]
    return next(kind for kind in KINDS.values() if kind.experts == experts and kind.objective in ("dial", "weights"))


def router_objective(tuning: FinetuneConfig) -> str:
    """What trains the routers: see :attr:`Router.objective`."""
    if tuning.router == AUTO_ROUTER:
        return "dial"
    return router_kind(tuning, "").objective


def router_layout(tuning: FinetuneConfig, hidden_size: int, carved: RouterLayout) -> RouterLayout:
    """Routers that the recipe trains, for D = ``hidden_size``, after those that carve left.

    Where training starts from a closed-form router, its bound is kept, so that scores are what carve measured.
    """
    kind = router_kind(tuning, KINDS[carved.kind].experts)
    if kind is UniformRouter:
        return RouterLayout()
    if kind.objective == "weights":
        return carved
    bound = tuning.bound
    if bound is None:
        bound = carved.bound if starts_from(carved, kind.kind) else kind.default_bound
    rank = 64 * math.ceil(hidden_size / 16 / 64) if tuning.router_rank is None else tuning.router_rank
    # Kinds with one score a token do without the linear branch where they have a hidden one.
    return RouterLayout(kind.kind, linear=rank == 0 or kind.features > 0, rank=rank, bound=bound)


def starts_from(carved: RouterLayout, kind: str) -> bool:
    """Whether routers of ``kind`` start from the closed-form ones that carve solved."""
    return carved.kind == kind and (KINDS[kind].closed_form or KINDS[kind].objective == "weights")
