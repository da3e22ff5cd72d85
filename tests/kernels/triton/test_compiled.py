"""What is shipped compiles for GPUs that are not there: nothing spills, rows are read 16 bytes at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parent / "compiling.py"
pytest.importorskip("triton", reason="triton is not installed, and these tests are of its kernels")
READS_ROWS = ("look.sketched_kernel", "values.chosen_kernel", "down.down_kernel")


def compiled(*arguments: str) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(PROGRAM.parents[3]), os.environ.get("PYTHONPATH", "")])
    environment |= {"PYTHONPATH": path, "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run([sys.executable, str(PROGRAM), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def for_sm_90() -> dict[str, Any]:
    return compiled("--capability", "90")


def check(found: dict[str, Any]) -> None:
    assert {name.split()[0] for name in found} >= {*READS_ROWS, "staircase.down_kernel", "down.low_down_kernel"}
    for name, kernel in found.items():
        assert kernel["spilled"] == 0, f"{name} spills {kernel['spilled']} bytes at {kernel['registers']} registers"
        if name.startswith(READS_ROWS):
            assert kernel["wide"] > 0, f"{name} has no load of 16 bytes"
        if name.startswith("staircase"):
            # One step of both operands takes 32 KiB.
            assert kernel["shared"] >= 48 << 10, (
                f"{name} does not load ahead: {kernel['shared']} bytes of shared memory"
            )


def test_nothing_spills_and_rows_are_read_wide_on_sm_90(for_sm_90: dict[str, Any]) -> None:
    check(for_sm_90)


def test_nothing_spills_and_rows_are_read_wide_on_sm_80() -> None:
    check(compiled("--capability", "80", "--tokens", "1", "2048"))


def test_sums_within_rows_run_alike_whatever_the_number_of_tokens(for_sm_90: dict[str, Any]) -> None:
    """A token's bits depend on the order in which threads add up; it follows from the layouts of what is summed."""
    for kernel in ("look.sketched_kernel", "values.chosen_kernel"):
        found = {name: tuple(map(tuple, one["sums"])) for name, one in for_sm_90.items() if name.startswith(kernel)}
        layouts = list(found.values())
        assert len(layouts) >= 2 and layouts[0] and len(set(layouts)) == 1, f"{kernel}: {set(layouts)}"


def test_other_shapes_and_dtypes_compile() -> None:
    assert compiled("--shapes", "odd", "--dtype", "float32", "--tokens", "2", "17")
