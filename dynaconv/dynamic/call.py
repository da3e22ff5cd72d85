"""The call that is under way in a model: its policy and its recorder, seen by every site inside it.

Decoder layers pass no unknown keywords down to their FFN, so both travel in one object that all sites of a model hold.
Each thread has its own, so that calls in two threads do not see each other, and compiled code may read it. It belongs
to one model: a draft model that runs inside another's ``generate`` has its own. Ships with every exported model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from dynaconv.dynamic.per_thread import PerThread
from dynaconv.dynamic.policy import Policy
from dynaconv.dynamic.recorder import Recorder


class Call(PerThread):
    """What the sites of one model do in this thread.

    Attributes:
        policy: Decides what tokens use; ``None`` outside of any call: all blocks.
        recorder: Is told what every site did; ``None`` where nobody looks.
    """

    def __init__(self) -> None:
        self.policy: Policy | None = None
        self.recorder: Recorder | None = None

    @contextmanager
    def using(self, policy: Policy | None = None, recorder: Recorder | None = None) -> Iterator[None]:
        """Every site called inside uses ``policy``, and tells ``recorder`` what it did; without either, as before."""
        before = self.policy, self.recorder
        self.policy = self.policy if policy is None else policy
        self.recorder = self.recorder if recorder is None else recorder
        try:
            yield
        finally:
            self.policy, self.recorder = before


def checkpoint_contexts(call: Call) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """``context_fn`` of ``torch.utils.checkpoint``: a recomputation runs under the policy of its own forward pass."""
    return nullcontext(), _recomputing(call, call.policy, call.recorder)


@contextmanager
def _recomputing(call: Call, policy: Policy | None, recorder: Recorder | None) -> Iterator[None]:
    before = call.policy, call.recorder
    call.policy, call.recorder = policy, None if recorder is None else recorder.in_recomputation()
    try:
        yield
    finally:
        call.policy, call.recorder = before
