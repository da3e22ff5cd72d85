"""State that each thread has for itself, in an object that models can hold. Ships with every exported model."""

from __future__ import annotations

import threading
from typing import Any


class PerThread(threading.local):
    """A ``threading.local`` that pickles and copies with its model: as a new one, since calls do not travel.

    Compiled code may read it. Attributes are set in ``__init__``, which runs once a thread: those that came later would
    make compiled code compile anew.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), ())

    def __deepcopy__(self, memo: dict[int, Any]) -> PerThread:
        return type(self)()
