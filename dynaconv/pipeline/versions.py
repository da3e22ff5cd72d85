"""Versions of what a result was made with, read without importing any of it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from dynaconv.version import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "datasets")


def versions() -> dict[str, str]:
    """Versions of Python, dynaconv and the packages that change results; those not installed are left out."""
    found = {"python": platform.python_version(), "dynaconv": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
