"""The policy of a call: set around it, seen by every FFN inside it, and reinstated where the call is recomputed.

Decoder layers pass no unknown keywords down to their FFN, so the policy travels in a context variable. It belongs to
the call: nothing is left behind on layers, and two threads or two nested calls do not see each other's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dynaconv.dynamic.policy import Policy

_policy: ContextVar[Policy | None] = ContextVar("dynaconv_policy", default=None)
_trace: ContextVar[Trace | None] = ContextVar("dynaconv_trace", default=None)


class Trace:
    """Widths that tokens used, by layer, in call order.

    Attributes:
        widths: ``widths[layer]`` is a list of (B, T) int64 tensors, one for each forward pass.
    """

    def __init__(self) -> None:
        self.widths: dict[int, list[Tensor]] = {}

    def add(self, layer: int, widths: Tensor) -> None:
        """Records (B, T) ``widths`` of ``layer``."""
        self.widths.setdefault(layer, []).append(widths.detach())

    def stacked(self) -> Tensor:
        """All widths as one (L, tokens) int64 tensor, layers in order."""
        return torch.stack([torch.cat([w.flatten() for w in self.widths[layer]]) for layer in sorted(self.widths)])


def current_policy() -> Policy | None:
    """The policy of the call this code runs in, ``None`` outside of one."""
    return _policy.get()


def current_trace() -> Trace | None:
    """The trace being recorded, ``None`` when nobody asked for one."""
    return _trace.get()


@contextmanager
def using(policy: Policy) -> Iterator[None]:
    """Every FFN called inside uses ``policy``."""
    token = _policy.set(policy)
    try:
        yield
    finally:
        _policy.reset(token)


@contextmanager
def recording() -> Iterator[Trace]:
    """Records the width of every token in every layer called inside."""
    trace = Trace()
    token = _trace.set(trace)
    try:
        yield trace
    finally:
        _trace.reset(token)


@contextmanager
def _recomputing(policy: Policy | None) -> Iterator[None]:
    policy_token, trace_token = _policy.set(policy), _trace.set(None)  # recorded once already
    try:
        yield
    finally:
        _policy.reset(policy_token)
        _trace.reset(trace_token)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """``context_fn`` of ``torch.utils.checkpoint``: the recomputation runs under the policy of its own forward pass."""
    return nullcontext(), _recomputing(_policy.get())
