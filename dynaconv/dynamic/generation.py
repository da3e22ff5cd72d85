"""Generation at a dial: who decides what a decoding step uses, and who owns its cache. Ships with every exported model.

transformers' own ``generate`` runs the loop. Its key-value cache (``past_key_values``) is made for the call, belongs to
it and is filled at whatever dial each step ran; nothing of ours is kept in it. The dial is that of the surrounding
call: :meth:`DialedGeneration.generate` sets it for all steps of its thread, and a step that names its own (``dial=``)
wins. A draft model (``assistant_model``) keeps the dial it has itself: ``model.at(0.25)`` drafts at .25 with the same
weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dynaconv.dynamic.dial import DialLike
from dynaconv.dynamic.per_thread import PerThread
from dynaconv.dynamic.policy import Policy
from dynaconv.dynamic.thresholds import Thresholds


class Surrounding(PerThread):
    """What calls of one model use in this thread where they name no dial of their own.

    Attributes:
        policy: That of the surrounding ``generate``; ``None`` outside of one: the model's own dial.
        thresholds: Of the outermost ``generate``; one inside another has its own.
    """

    def __init__(self) -> None:
        self.policy: Policy | None = None
        self.thresholds = Thresholds()


class DialedGeneration:
    """Mixin: ``generate`` with a dial."""

    surrounding: Surrounding

    def policy(self, dial: DialLike, *, held: Thresholds | None = None) -> Policy:
        """Of the model."""
        raise NotImplementedError

    def generate(self, *args: Any, dial: DialLike | None = None, **kwargs: Any) -> Any:
        """Stock ``generate`` at ``dial``: a budget, a :class:`Dial`, or one for each sequence of the batch."""
        if dial is None:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        with self.dialed(dial):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def dialed(self, dial: DialLike) -> Iterator[None]:
        """Calls inside that name no dial use ``dial``, in this thread."""
        before = self.surrounding.policy
        self.surrounding.policy = self.policy(dial, held=self.surrounding.thresholds if before is None else None)
        try:
            yield
        finally:
            self.surrounding.policy = before
