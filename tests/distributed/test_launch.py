"""``--nproc``: the same results as one process, one error and one exit code whichever rank fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, make_checkpoint
from tiny_run import documents_file

from dynaconv.artifacts.run import Run
from dynaconv.artifacts.tensors import read_tensors
from dynaconv.cli.quiet import SETTINGS as QUIET
from dynaconv.errors import DynaconvError
from dynaconv.pipeline import launch

PDSH = """
while [ "$1" != -w ]; do shift; done; shift; shift
for n in 0 1; do sh -c "$(echo "$*" | sed s/%n/$n/)" || exit 1; done
"""
HERE = Path(__file__).resolve().parent
TINY = (  # noqa: SIM905
    "--recipe routed block_size=24 finetune.router_rank=8 data.sequence_length=32 data.validation_share=0.5 "
    "profile.tokens=1024 profile.batch_size=8 "
    "finetune.tokens=1024 finetune.batch_size=4 finetune.warmup_steps=2 finetune.save_every=2 finetune.wandb=off "
    "calibrate.budgets=[0.5] calibrate.tokens=512 calibrate.score_tokens=512 calibrate.batch_size=8 "
    "calibrate.speed_tokens=0"
).split()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> list[str]:
    """Source and settings of a tiny run."""
    folder = tmp_path_factory.mktemp("launch")
    return [str(make_checkpoint(folder / "parent")), f"data={documents_file(folder, text_file)}", *TINY]


def dynaconv(
    *arguments: str,
    program: str = "dynaconv.cli.app",
    to_end: float | None = None,
    cwd: Path | None = None,
    **more: str,
) -> subprocess.Popen[str]:
    """The command, started, with the ``program`` that is each rank and the seconds the others get to end."""
    path = os.pathsep.join([str(HERE), str(ROOT)])
    environment = {
        **os.environ,
        **QUIET,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": path,
        **more,
    }
    change = f"import sys; import dynaconv.pipeline.launch as l; l.PROGRAM = {program!r}"
    if to_end is not None:
        change += f"; l.SECONDS_TO_END = {to_end}"
    command = [sys.executable, "-P", "-c", f"{change}; from dynaconv.cli.app import main; main()", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, cwd=cwd, text=True, start_new_session=True, **pipes)


def said(process: subprocess.Popen[str], timeout: float = 300) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, out, err


def results(folder: Path) -> dict[str, Any]:
    run = Run.open(folder)
    frontier = json.loads((run.folder(run.manifest.record("calibrate")) / "frontier.json").read_text())
    tensors = {
        stage: read_tensors(next(run.folder(run.manifest.record(stage)).glob(pattern)))
        for stage, pattern in (("profile", "*.safetensors"), ("finetune", "model*.safetensors"))
    }
    return {**tensors, "frontier": frontier}


def test_two_processes_publish_what_one_does(words: list[str], tmp_path: Path) -> None:
    tail = [*words, "--until", "calibrate", "--json"]
    code, _, told = said(dynaconv("convert", *tail, "--out", str(tmp_path / "one")))
    assert code == 0, told
    code, out, told = said(
        dynaconv("convert", *tail, "--out", str(tmp_path / "two"), "--nproc", "2", "engine.kind=deepspeed")
    )
    assert code == 0, told
    assert json.loads(out), "rank 0's JSON, and nothing else on stdout"
    assert told == "", "a quiet command stays quiet on every rank"
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    for stage in ("profile", "finetune"):
        assert sorted(one[stage]) == sorted(two[stage])
        for name, tensor in one[stage].items():
            assert torch.allclose(tensor.double(), two[stage][name].double(), rtol=1e-4, atol=1e-5), f"{stage}: {name}"
    for a, b in zip(one["frontier"]["frontier"], two["frontier"]["frontier"], strict=True):
        assert a.pop("width_by_layer") == pytest.approx(b.pop("width_by_layer"), rel=1e-6)
        assert a.pop("tokens_per_s") is b.pop("tokens_per_s") is None
        assert a == pytest.approx(b, rel=1e-5)
    assert one["frontier"]["parent"]["loss"] == pytest.approx(two["frontier"]["parent"]["loss"], rel=1e-6)
    assert len((tmp_path / "two" / "03-finetune" / "metrics.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("fails", "code", "what"),
    [("text", 2, "rank one read bad text"), ("bug", 1, "ValueError: a slip"), ("killed", 1, "another process ended")],
)
def test_a_failing_rank_ends_all_with_one_message(
    words: list[str], tmp_path: Path, fails: str, code: int, what: str
) -> None:
    arguments = ["convert", *words, "--until", "profile", "--out", str(tmp_path / "run"), "--nproc", "2"]
    got, out, told = said(dynaconv(*arguments, program="failing", FAILS=fails))
    assert (got, out) == (code, ""), told
    assert told.count("error: ") == 1 and what in told
    assert not list((tmp_path / "run").glob("[.0-9]*profile*")), "nothing half made is left"


def test_a_rank_killed_before_it_meets_the_others_ends_the_command(words: list[str], tmp_path: Path) -> None:
    arguments = ["convert", *words, "--out", str(tmp_path / "run"), "--nproc", "2"]
    code, out, told = said(dynaconv(*arguments, program="ending_early", to_end=1), timeout=120)
    assert (code, out) == (128 + signal.SIGKILL, ""), told
    assert "error: rank 1 of 2 ended before the others" in told
    assert "killed by SIGKILL" in told and "Traceback" not in told


def test_a_failing_rank_is_given_less_than_half_a_minute() -> None:
    assert launch.SECONDS_TO_END < 30


@pytest.mark.parametrize("ends", [0, 1, 2])
@pytest.mark.parametrize(
    ("how", "expected"), [("os.kill(os.getpid(), 9)", 128 + signal.SIGKILL), ("sys.exit(3)", 3), ("sys.exit(0)", 1)]
)
def test_whichever_rank_ends_and_however_the_wait_is_over(
    monkeypatch: pytest.MonkeyPatch, ends: int, how: str, expected: int
) -> None:
    monkeypatch.setattr(launch, "SECONDS_TO_END", 0.2)
    wait, end = "import time; time.sleep(600)", f"import os, sys; {how}"
    ranks = [subprocess.Popen([sys.executable, "-c", end if rank == ends else wait]) for rank in range(3)]
    if ends == 0 and "exit" in how:  # rank 0 is done, or has said why not
        assert launch._wait(ranks) == (3 if "3" in how else 0)
    else:
        with pytest.raises(DynaconvError, match=f"rank {ends} of 3") as caught:
            launch._wait(ranks)
        assert caught.value.exit_code == expected
    assert all(process.returncode is not None for process in ranks)


@pytest.mark.parametrize("where", ["processes", "one host", "two hosts"])
def test_no_rank_imports_from_the_current_folder(
    words: list[str], hostile_folder: Path, tmp_path: Path, where: str
) -> None:
    (hostile_folder / "hosts").write_text("a slots=1\nb slots=1\n" if where == "two hosts" else "a slots=2\n")
    (hostile_folder / ".deepspeed_env").write_text("NCCL_DEBUG=$(touch executed)\n")
    for name, script in {"ssh": "echo 127.0.0.1", "pdsh": PDSH}.items():  # every host is this machine
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    several = "--nproc=2" if where == "processes" else "--hostfile=hosts"
    arguments = ["convert", *words, "--out", str(hostile_folder / "run"), several]
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    code, out, told = said(dynaconv(*arguments, program="importing", cwd=hostile_folder, PATH=path))
    assert code == 0, told
    assert not (hostile_folder / "executed").exists()
    found = [json.loads(line) for line in out.splitlines() if line.startswith("[") and "json" in line]
    assert len(found) == 2, out
    for paths in found:
        assert str(hostile_folder) not in str(paths)
        assert paths[-1].startswith(str(ROOT)), "a PYTHONPATH of the user's holds"


def test_a_signal_to_the_launcher_saves_on_every_rank(words: list[str], tmp_path: Path) -> None:
    tail = [*words, "--out", str(tmp_path / "run")]
    assert said(dynaconv("convert", *tail, "--until", "carve"))[0] == 0
    more = ["finetune.tokens=1e6", "finetune.save_every=100000"]
    process = dynaconv("finetune", str(tmp_path / "run"), *more, "--nproc", "2")
    metrics = tmp_path / "run" / ".work" / "03-finetune" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, _, told = said(process)
    assert code != 0 and "Traceback" not in told
    states = list(metrics.parent.glob("state-*"))
    assert len(states) == 1, told
    assert sorted(path.name for path in states[0].glob("random-*")) == [
        "random-00000.safetensors",
        "random-00001.safetensors",
    ]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("--nproc=3", "3 processes do not divide a micro-batch of 4 sequences"),
        ("--nproc=8", "some get none; finetune.batch_size=8 would do"),
        ("--hostfile=nowhere", "the hostfile cannot be read"),
    ],
)
def test_processes_that_cannot_share_are_refused_before_any_starts(
    words: list[str], tmp_path: Path, override: str, told: str
) -> None:
    code, _, error = said(dynaconv("convert", *words, "--out", str(tmp_path / "run"), override))
    assert code == 2 and told in error
    assert not (tmp_path / "run").exists()
