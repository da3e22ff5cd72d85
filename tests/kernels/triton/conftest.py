"""Which tests are collected.

Files in ``interpreted/`` run where ``TRITON_INTERPRET=1`` is set before triton is imported; ``test_interpreted.py``
runs them so in a process of its own.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
collect_ignore = [] if INTERPRETED else ["interpreted"]
