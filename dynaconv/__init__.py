"""dynaconv: turn a dense language-model checkpoint into one with a dial.

``dynaconv.load(folder)`` gives a dynamic model, ``dynaconv.Dial`` says how much of it to use. Importing this package
imports no torch; the names below load what they need when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynaconv.version import __version__

if TYPE_CHECKING:
    from dynaconv.dynamic.dial import Dial
    from dynaconv.dynamic.modeling import load

__all__ = ["Dial", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "Dial":
        from dynaconv.dynamic.dial import Dial

        return Dial
    if name == "load":
        from dynaconv.dynamic.modeling import load

        return load
    raise AttributeError(f"module 'dynaconv' has no attribute {name!r}")
