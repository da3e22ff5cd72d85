"""CPU threads: the fastest are taken, what the user settled counts, and an interrupted stage keeps its number."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from fake_stages import FAKES, FakeStage, make_config, make_source

from dynaconv import threads
from dynaconv.artifacts.run import MadeFor, Run
from dynaconv.errors import DataError
from dynaconv.pipeline import registry, runner
from dynaconv.pipeline.runner import run_pipeline
from dynaconv.pipeline.stage import StageContext
from dynaconv.progress import Progress
from dynaconv.threads import ThreadCount, candidates, choose, fastest, measure

Seconds = Callable[[int], float]


@pytest.fixture(autouse=True)
def unsettled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight cores that nobody else uses, and an environment that says nothing."""
    for name in threads.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))


def free(count: int) -> float:
    """Eight free cores: nine tenths of the work is shared."""
    return 0.1 + 0.9 / count


def busy(count: int) -> float:
    """Every further thread waits for its turn on a core at each operation."""
    return 1.0 + 0.7 * (count - 1)


def small(count: int) -> float:
    """Matrices too small to share: more threads win next to nothing."""
    return 1.0 - 0.01 * count


@pytest.mark.parametrize(
    ("cores", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])]
)
def test_candidates(cores: int, expected: list[int]) -> None:
    assert candidates(cores) == expected


@pytest.mark.parametrize(
    ("seconds", "count", "reason"),
    [
        (free, 8, "8 CPU threads: 4.7 times as fast as 1 just now"),
        (busy, 1, "1 CPU thread: 1.7 times as fast as 2 just now"),
        (small, 1, "1 CPU thread: 8 are no faster just now"),
        (lambda count: 1.0 if count == 1 else 18.0 - count, 1, "1 CPU thread: 10.0 times as fast as 8 just now"),
        (lambda count: {1: 9.0, 2: 5.0, 4: 1.0, 8: 2.0}[count], 4, "4 CPU threads: 9.0 times as fast as 1 just now"),
        (lambda count: {1: 2.0, 2: 1.04, 4: 1.0, 8: 1.5}[count], 2, "2 CPU threads: 1.9 times as fast as 1 just now"),
    ],
    ids=["free", "busy", "small", "hopeless", "some", "as good"],
)
def test_the_fewest_that_are_as_good_as_the_fastest(seconds: Seconds, count: int, reason: str) -> None:
    assert choose(seconds=seconds) == ThreadCount(count, reason)


def test_a_few_long_waits_count_and_what_is_hopeless_is_not_timed_again() -> None:
    calls: list[int] = []

    def seconds(count: int) -> float:
        calls.append(count)
        return {1: 1.0, 2: 0.6 if calls.count(2) % 4 else 4.0, 4: 30.0}[count]

    means = measure([1, 2, 4], seconds)
    assert calls.count(4) == 1
    assert means == pytest.approx({1: 1.0, 2: 0.75 * 0.6 + 0.25 * 4.0, 4: 30.0})
    assert fastest(means).count == 1


@pytest.mark.parametrize("name", threads.SETTINGS)
def test_what_the_user_settled_is_not_measured_and_not_mentioned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "3,1")
    assert threads.given() == 3
    assert choose(seconds=lambda count: pytest.fail("measured"), before=2) == ThreadCount(None)
    before = torch.get_num_threads()
    with threads.using(None):
        assert torch.get_num_threads() == before


@pytest.mark.parametrize("value", ["", "many", "0", "-1"])
def test_a_setting_that_makes_no_sense_settles_nothing(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert choose(seconds=free).count == 8


def test_ranks_share_the_cores() -> None:
    assert choose(seconds=free, ranks=4).count == 2
    assert choose(seconds=lambda count: pytest.fail("nothing to choose from"), ranks=16) == ThreadCount(1)


@pytest.mark.parametrize(
    ("load", "timed"), [(0.4, {1, 2, 4, 8}), (3.0, {1, 2, 4, 5}), (6.2, {1, 2})], ids=["free", "some", "most"]
)
def test_no_more_threads_than_cores_are_free(load: float, timed: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "others_load", lambda: load)
    asked: set[int] = set()

    def seconds(count: int) -> float:
        asked.add(count)
        return free(count)

    assert choose(seconds=seconds).count == max(timed)
    assert asked == timed


def test_on_busy_cores_one_thread_is_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "others_load", lambda: 9.25)
    chosen = choose(seconds=lambda count: pytest.fail("a quiet moment would mislead"))
    assert chosen == ThreadCount(1, "1 CPU thread: other programs want 9.2 cores")


def test_the_load_of_others_is_without_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (3.5, 0.0, 0.0))
    monkeypatch.setattr("time.process_time", lambda: 100.0)
    monkeypatch.setattr("time.monotonic", lambda: threads.IMPORTED + 50)
    assert threads.others_load() == pytest.approx(3.5 - 100 / 60)
    monkeypatch.setattr("time.monotonic", lambda: threads.IMPORTED + 200)
    assert threads.others_load() == pytest.approx(3.0)
    monkeypatch.setattr("time.process_time", lambda: 1000.0)
    assert threads.others_load() == 0.0


def test_what_was_begun_goes_on_with_its_number_while_there_are_the_cores() -> None:
    assert choose(seconds=free, before=4) == ThreadCount(4, "4 CPU threads: as this was begun")
    assert choose(seconds=free, before=16).count == 8


@pytest.mark.parametrize(
    ("content", "quota"), [("max 100000", None), ("150000 100000", 1.5), ("garbage", None)], ids=["none", "some", "bad"]
)
def test_the_quota_of_a_control_group(
    content: str, quota: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    assert threads._quota() is None
    (tmp_path / "cpu.max").write_text(content)
    assert threads._quota() == quota


def test_usable_cores_are_those_the_process_is_bound_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    monkeypatch.setattr(threads, "_quota", lambda: None)
    assert threads.usable_cores() == 3
    monkeypatch.setattr(threads, "_quota", lambda: 1.5)
    assert threads.usable_cores() == 2
    monkeypatch.setattr(threads, "_quota", lambda: 0.3)
    assert threads.usable_cores() == 1


def test_the_real_measurement_leaves_the_threads_of_torch_and_its_random_state_alone() -> None:
    before, state = torch.get_num_threads(), torch.get_rng_state()
    assert choose(lambda: threads.Work(tokens=4, hidden=8, ffn=16), ranks=8) == ThreadCount(1)
    seconds = threads._timer(threads.Work(tokens=10**6, hidden=10**5, ffn=10**6))  # cut to what fits in no time
    assert seconds(1) > 0
    assert torch.get_num_threads() == before
    assert torch.equal(torch.get_rng_state(), state)


SPINNING = """
import os
from dynaconv.cli.app import app
from typer.testing import CliRunner
CliRunner().invoke(app, ["recipes"])
print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("more", "expected"),
    [({}, threads.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["nothing set", "count set", "policy set"],
)
def test_commands_limit_spinning_unless_the_user_says_otherwise(more: dict[str, str], expected: str) -> None:
    import os

    others = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    command = [sys.executable, "-c", SPINNING]
    found = subprocess.run(command, env=others | more, capture_output=True, text=True, check=True)
    assert found.stdout.split()[-1] == expected


class Chooser:
    """Stands in for measuring: what it would choose, and with how many threads each stage ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.would, self.ran = 2, list[tuple[str, int]]()
        monkeypatch.setattr(runner, "choose", self.choose)
        run = FakeStage.run

        def noted(stage: FakeStage, context: StageContext) -> dict[str, object]:
            self.ran.append((stage.name, torch.get_num_threads()))
            return run(stage, context)

        monkeypatch.setattr(FakeStage, "run", noted)

    def choose(self, work: Callable[[], threads.Work], *, ranks: int, before: int | None) -> ThreadCount:
        assert work() == threads.Work()  # of a source that is no checkpoint
        return choose(ranks=ranks, before=before, seconds=lambda count: 1.0 if count == self.would else 10.0)


@pytest.fixture
def chooser(monkeypatch: pytest.MonkeyPatch) -> Chooser:
    monkeypatch.setattr(registry, "STAGES", FAKES)
    return Chooser(monkeypatch)


def test_each_stage_chooses_anew_and_says_so_where_it_changes(
    chooser: Chooser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = make_config(make_source(tmp_path / "model")), Run.create(tmp_path / "run")
    with Progress() as progress:
        run_pipeline(config, run, progress=progress, until="carve")
        said = capsys.readouterr().err
        assert said.count("2 CPU threads: 10.0 times as fast as 1 just now") == 1
        assert "2 CPU threads" in (run.logs / "carve.log").read_text(encoding="utf-8")
        chooser.would = 4
        run_pipeline(config, run, progress=progress, until="finetune")
    assert chooser.ran == [("profile", 2), ("carve", 2), ("finetune", 4)]
    assert torch.get_num_threads() == 1


def test_an_interrupted_stage_goes_on_with_its_number_of_threads(
    chooser: Chooser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = make_config(make_source(tmp_path / "model")), Run.create(tmp_path / "run")
    monkeypatch.setattr(FakeStage, "fail", "finetune")
    with pytest.raises(DataError):
        run_pipeline(config, run, progress=Progress(quiet=True))
    chooser.would = 8
    monkeypatch.setattr(FakeStage, "fail", "")
    run_pipeline(config, run, progress=Progress(quiet=True), until="finetune")
    assert [count for name, count in chooser.ran if name == "finetune"] == [2, 2]
    run_pipeline(config, run, progress=Progress(quiet=True), until="calibrate")
    assert chooser.ran[-1] == ("calibrate", 8)
    run_pipeline(config, run, progress=Progress(quiet=True), until="finetune", redo="finetune")
    assert chooser.ran[-1] == ("finetune", 8)  # made again from the start: nothing binds it


def test_what_the_user_settles_wins_over_what_was_begun_and_is_recorded(
    chooser: Chooser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = make_config(make_source(tmp_path / "model")), Run.create(tmp_path / "run")
    monkeypatch.setattr(FakeStage, "fail", "profile")
    for settled, expected in ((None, 2), ("3", 3), (None, 3)):
        if settled is None:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", settled)
        with pytest.raises(DataError):
            run_pipeline(config, run, progress=Progress(quiet=True))
        mark = MadeFor.of(run.path / ".work" / "01-profile")
        assert mark is not None
        assert mark.threads == expected
    assert [count for _, count in chooser.ran] == [2, 1, 3]  # set in the environment: torch is left as it is


def test_a_mark_of_an_earlier_version_has_no_number() -> None:
    old = {name: value for name, value in asdict(MadeFor("a", threads=2)).items() if name != "threads"}
    assert MadeFor(**old).threads is None
