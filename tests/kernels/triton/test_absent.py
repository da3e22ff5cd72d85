"""Without triton, or away from a GPU, the backends say why they cannot run, and nothing imports triton."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from sketched_networks import Case

from dynaconv.kernels import triton_support
from dynaconv.kernels.blocks import BlockedFFN
from dynaconv.kernels.choice import Prefix
from dynaconv.kernels.partition import Partition
from dynaconv.kernels.triton_blocks import TRITON
from dynaconv.kernels.triton_sketched import TRITON_SKETCHED


def answers() -> set[tuple[bool, str]]:
    case = Case(40, 12)
    x, blocks = case.draw(1, 40), BlockedFFN(case.weights, Partition.equal(12, 1))
    choice = Prefix(torch.ones(1, dtype=torch.int64))
    return {TRITON.can_run(blocks, x, choice), TRITON_SKETCHED.can_run(case.sketched(), x)}


def test_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert answers() == {(False, "tensors are not on a GPU")}


@pytest.mark.parametrize(("release", "why"), [(None, "triton is not installed"), ("3.1.0", "triton is 3.1.0")])
def test_without_triton_or_with_an_old_one(monkeypatch: pytest.MonkeyPatch, release: str | None, why: str) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_support, "find_spec", lambda name: release)
    monkeypatch.setattr(triton_support, "version", lambda name: release)
    triton_support._missing.cache_clear()
    try:
        found = answers()
    finally:
        triton_support._missing.cache_clear()
    assert all(not able and reason.startswith(why) for able, reason in found)


def test_backends_are_imported_without_triton() -> None:
    code = (
        "import sys, dynaconv.kernels.triton_blocks, dynaconv.kernels.triton_sketched\n"
        "sys.exit('triton' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
