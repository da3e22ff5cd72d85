"""Chooses how a dynamic FFN is computed, and says why. Ships with every exported model.

The first of :data:`BACKENDS` that can run does; the reference, which always can, comes last.

M tokens, D residual width, N blocks.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

from torch import Tensor

from dynaconv.kernels.backend import Backend
from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Choice
from dynaconv.kernels.cpu_nested import CPU_NESTED
from dynaconv.kernels.cpu_routed import CPU_ROUTED
from dynaconv.kernels.cpu_sketched import CPU_SKETCHED
from dynaconv.kernels.reference import REFERENCE
from dynaconv.kernels.sketched import SketchedBackend, SketchedFFN
from dynaconv.kernels.triton_blocks import TRITON
from dynaconv.kernels.triton_sketched import TRITON_SKETCHED

SKETCHED: list[SketchedBackend] = [TRITON_SKETCHED, CPU_SKETCHED]
BACKENDS: list[Backend] = [TRITON, CPU_NESTED, CPU_ROUTED, REFERENCE]


class Dispatch(NamedTuple):
    """The backend that runs.

    Attributes:
        backend: It.
        reason: Why it can, in one sentence for people.
        passed_over: Names of the backends before it, and why each cannot run.
    """

    backend: Backend
    reason: str
    passed_over: dict[str, str]


def decide(ffn: BlockedFFN, x: Tensor, choice: Choice) -> Dispatch:
    """The backend that :func:`blocked_ffn` runs for these arguments, and why."""
    passed_over: dict[str, str] = {}
    for backend in BACKENDS:
        able, reason = backend.can_run(ffn, x, choice)
        if able:
            return Dispatch(backend, reason, passed_over)
        passed_over[backend.name] = reason
    raise AssertionError("the reference can always run")


def blocked_ffn(ffn: BlockedFFN, x: Tensor, choice: Choice) -> Tensor:
    """The FFN of each token restricted to its own blocks, by the first backend that can.

    Args:
        ffn: The network.
        x: ``(M, D)``.
        choice: Over the M tokens.

    Returns:
        ``(M, D)``. With gradients where grad mode is on and ``x`` or a weight wants one.
    """
    chosen = decide(ffn, x, choice)
    _log_once(chosen.backend.name, chosen.reason)
    return chosen.backend.run(ffn, x, choice)


def sketched_backend(ffn: SketchedFFN, x: Tensor) -> SketchedBackend | None:
    """The first of :data:`SKETCHED` that can run for tokens ``x`` (M, D); ``None``: the router's choice is computed."""
    for backend in SKETCHED:
        able, reason = backend.can_run(ffn, x)
        _log_once(backend.name, reason if able else f"does not run: {reason}")
        if able:
            return backend
    return None


_logged: set[tuple[str, str]] = set()


def _log_once(name: str, reason: str) -> None:
    if (name, reason) not in _logged:
        _logged.add((name, reason))
        logging.getLogger("dynaconv").debug("FFN backend %s: %s", name, reason)
