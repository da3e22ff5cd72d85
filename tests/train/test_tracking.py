"""Metrics always reach the local file, once a step, and wandb as the recipe says."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from dynaconv.train.tracking import Tracker

LOG = logging.getLogger("test")


def tracker(folder: Path, mode: str = "off", step: int = 0) -> Tracker:
    return Tracker(
        folder / "metrics.jsonl", mode=mode, folder=folder / "logs", config={"a": {"b": 1}}, step=step, log=LOG
    )


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_steps_after_the_saved_state_are_written_again_not_twice(tmp_path: Path) -> None:
    first = tracker(tmp_path)
    for step in range(5):
        first.log(step, {"loss": float(step)})
    first.close()
    second = tracker(tmp_path, step=3)
    for step in range(3, 6):
        second.log(step, {"loss": 10.0 + step})
    second.close()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3, 4, 5]
    assert [line["loss"] for line in lines(tmp_path)] == [0.0, 1.0, 2.0, 13.0, 14.0, 15.0]


def test_a_line_that_a_killed_run_left_unfinished_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    made = tracker(tmp_path, step=1)
    made.log(1, {"loss": 2.0})
    made.close()
    assert [line["loss"] for line in lines(tmp_path)] == [1.0, 2.0]


def test_without_a_key_wandb_is_offline_and_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    made = tracker(tmp_path, "auto")
    made.log(0, {"loss": 1.0})
    made.close()
    assert list((tmp_path / "logs").rglob("*.wandb")), "nothing was recorded"
    assert not (tmp_path / "wandb").exists(), "files outside of the run's logs"
    assert lines(tmp_path) == [{"step": 0, "loss": 1.0}]
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_off_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # importing it would fail
    made = tracker(tmp_path)
    made.log(0, {"loss": 1.0})
    made.close()
    assert not (tmp_path / "logs").exists()
