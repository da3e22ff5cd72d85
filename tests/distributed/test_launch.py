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

HERE = Path(__file__).resolve().parent
TINY = (  # noqa: SIM905
    "block_size=24 data.sequence_length=32 data.validation_share=0.5 profile.tokens=1024 profile.batch_size=8 "
    "finetune.tokens=1024 finetune.batch_size=4 finetune.warmup_steps=2 finetune.save_every=2 finetune.wandb=off "
    "calibrate.budgets=[0.5] calibrate.tokens=512 calibrate.score_tokens=512 calibrate.batch_size=8 "
    "calibrate.speed_tokens=0"
).split()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> list[str]:
    """Source and settings of a tiny run."""
    folder = tmp_path_factory.mktemp("launch")
    return [str(make_checkpoint(folder / "parent")), f"data={documents_file(folder, text_file)}", *TINY]


def dynaconv(*arguments: str, program: str = "dynaconv.cli.app", **more: str) -> subprocess.Popen[str]:
    """The command, started."""
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
    command = [sys.executable, "-c", f"{change}; from dynaconv.cli.app import main; main()", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
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
