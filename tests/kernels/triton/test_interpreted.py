"""Runs the tests of ``interpreted/`` in a process in which Triton interprets: it must be told before it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
pytest.importorskip("triton", reason="triton is not installed, and these tests are of its kernels")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the tests themselves are collected")
def test_kernels_in_the_interpreter() -> None:
    root = HERE.parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted")]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
