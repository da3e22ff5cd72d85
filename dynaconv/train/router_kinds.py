"""Which router kind a recipe trains, and how it is built. D residual width."""

from __future__ import annotations

import math

from dynaconv.config import FinetuneConfig
from dynaconv.dynamic.layout import RouterLayout
from dynaconv.dynamic.routers.base import Router
from dynaconv.dynamic.routers.kinds import KINDS
from dynaconv.dynamic.routers.uniform import UniformRouter
from dynaconv.rules import AUTO_ROUTER, NO_ROUTER


def router_kind(tuning: FinetuneConfig, experts: str) -> type[Router]:
    """The kind that ``finetune.router`` asks for, of ``nested`` or ``routed`` experts."""
    if tuning.router == NO_ROUTER:
        return UniformRouter
    if tuning.router != AUTO_ROUTER:
        return KINDS[tuning.router]
    return next(kind for kind in KINDS.values() if kind.experts == experts and kind.objective == "dial")


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
    bound = tuning.bound
    if bound is None:
        bound = carved.bound if starts_from(carved, kind.kind) else kind.default_bound
    rank = 64 * math.ceil(hidden_size / 16 / 64) if tuning.router_rank is None else tuning.router_rank
    # Kinds with one score a token do without the linear branch where they have a hidden one.
    return RouterLayout(kind.kind, linear=rank == 0 or kind.features > 0, rank=rank, bound=bound)


def starts_from(carved: RouterLayout, kind: str) -> bool:
    """Whether routers of ``kind`` start from the closed-form ones that carve solved."""
    return carved.kind == kind and KINDS[kind].closed_form
