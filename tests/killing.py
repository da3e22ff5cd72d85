"""Dying at a chosen instant, as if by SIGKILL: in a forked child, so that the imports need not be made again."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

# Calls after which the disk is in another state; a kill between any two of them is a case of its own.
CALLS = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync")
KILLED = 77


def killed_after(count: int, work: Callable[[], None], *more: tuple[Any, str]) -> bool:
    """Runs ``work`` in a child that dies right after its call number ``count``; whether it got that far.

    Args:
        count: From 1.
        work: What the child does.
        more: Owner and name of functions that count besides :data:`CALLS` of ``os``.
    """
    child = os.fork()
    if child == 0:
        remaining = [count]

        def dying(call: Callable[..., object]) -> Callable[..., object]:
            def counted(*args: object, **kwargs: object) -> object:
                result = call(*args, **kwargs)
                remaining[0] -= 1
                if remaining[0] == 0:
                    os._exit(KILLED)
                return result

            return counted

        try:
            for owner, name in (*((os, name) for name in CALLS), *more):
                setattr(owner, name, dying(getattr(owner, name)))
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED
