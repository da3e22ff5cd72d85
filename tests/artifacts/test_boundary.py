"""A run that was tampered with: nothing outside it is touched, and every command says which field or link is wrong."""

from __future__ import annotations

import copy
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_stages
import pytest
from fake_stages import FAKES, make_config, make_source
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dynaconv.artifacts.files import atomic_write
from dynaconv.artifacts.manifest import MANIFEST_FILE, Manifest
from dynaconv.artifacts.run import WORK_MARK, MadeFor, Run
from dynaconv.cli.app import app
from dynaconv.errors import ArtifactError, DynaconvError
from dynaconv.pipeline import registry
from dynaconv.pipeline.runner import run_pipeline, status
from dynaconv.progress import Progress

COMMANDS = {
    "convert": ["convert", "RUN"],
    "plan": ["plan", "RUN"],
    "export": ["export", "RUN"],
    "carve": ["carve", "RUN"],
    "dial-k": ["dial-k", "RUN", "--budget", "0.5", "--write"],
    "status": ["status", "RUN"],
    "eval": ["eval", "RUN", "--data", "RUN/recipe.yaml"],
    "generate": ["generate", "RUN", "--prompt", "x"],
}
ELSEWHERE = {
    "absolute": "{victim}",
    "upwards": "../victim",
    "upwards from a stage": "05-export/../../victim",
    "the run's parent": "..",
    "the run": ".",
    "nothing": "",
    "deeper": "05-export/deep",
    "another name": "victim",
    "another stage's": "02-carve",
    "with a NUL": "05-export\0",
    "with a newline": "05-export\n",
    "endless": "05-" + "x" * 5000,
    "half a character": "05-\ud800",
}
Tamper = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of fake stages."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "STAGES", FAKES)
        config = make_config(make_source(folder / "model"))
        run_pipeline(config, Run.create(folder / "run"), progress=Progress(quiet=True))
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, beside a folder that is not the run's."""
    monkeypatch.setattr(registry, "STAGES", FAKES)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "thesis.txt").write_text("years of work")
    return Path(shutil.copytree(finished, tmp_path / "run"))


def tree(folder: Path) -> dict[str, bytes | str]:
    """Everything below ``folder``."""
    found: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        kind = path.lstat().st_mode
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes() if stat.S_ISREG(kind) else oct(stat.S_IFMT(kind))
    return found


def tamper(run: Path, change: Tamper) -> None:
    content = json.loads((run / MANIFEST_FILE).read_text())
    change(content)
    (run / MANIFEST_FILE).write_text(json.dumps(content))


def assert_every_command_refuses(run: Path, *told: str) -> None:
    before = tree(run.parent)
    for name, words in COMMANDS.items():
        done = CliRunner().invoke(app, [word.replace("RUN", str(run)) for word in words])
        assert done.exit_code == 3, f"{name}: {done.output} {done.exception!r}"
        for text in told:
            assert text in done.output, f"{name}: {done.output}"
    assert tree(run.parent) == before


@pytest.mark.parametrize("where", ELSEWHERE)
@pytest.mark.parametrize("record", ["stages[4]", "publishing"])
def test_a_folder_elsewhere_is_refused_by_every_command(run: Path, where: str, record: str) -> None:
    def change(content: dict[str, Any]) -> None:
        if record == "publishing":
            content["publishing"] = {**copy.deepcopy(content["stages"][4]), "outputs": []}
        found = content["publishing"] if record == "publishing" else content["stages"][4]
        found["folder"] = ELSEWHERE[where].format(victim=run.parent / "victim")

    tamper(run, change)
    assert_every_command_refuses(run, MANIFEST_FILE, f"{record}.folder", "NN-export", "try: restore")


@pytest.mark.parametrize("path", ["/etc/passwd", "../../victim/thesis.txt", "deep/../../x", "", ".", "a//b", "\0"])
@pytest.mark.parametrize("record", ["stages[4]", "publishing"])
def test_an_output_elsewhere_is_refused(run: Path, path: str, record: str) -> None:
    def change(content: dict[str, Any]) -> None:
        content["publishing"] = copy.deepcopy(content["stages"][4])
        found = content["publishing"] if record == "publishing" else content["stages"][4]
        found["outputs"][1]["path"] = path

    tamper(run, change)
    with pytest.raises(ArtifactError, match="below 05-export") as caught:
        Run.open(run)
    assert f"{record}.outputs[1].path" in str(caught.value)


@pytest.mark.parametrize(
    "link", ["05-export", "01-profile", ".work", ".work/05-export", ".staging-05-export", ".old-05-export", "logs"]
)
def test_a_link_in_place_of_a_folder_is_refused(run: Path, link: str) -> None:
    shutil.rmtree(run / link, ignore_errors=True)
    (run / link).parent.mkdir(exist_ok=True)
    (run / link).symlink_to(run.parent / "victim")
    assert_every_command_refuses(run, link, "link", "try: ")


@pytest.mark.parametrize("link", ["05-export/deep", "05-export/part-0.bin"])
def test_outputs_behind_a_link_are_refused_where_it_leads_out(run: Path, link: str, tmp_path: Path) -> None:
    moved = (run / link).rename(run / "05-export" / "kept")
    (run / link).symlink_to(moved)
    Run.open(run)  # what stays inside is fine
    (run / link).unlink()
    moved.rename(tmp_path / "victim" / "moved")
    (run / link).symlink_to(tmp_path / "victim" / "moved")
    assert_every_command_refuses(run, "stages[4].outputs", "a symbolic link to")


@pytest.mark.parametrize("name", [".lock", "logs/export.log"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_written_to_is_a_plain_file(run: Path, name: str, kind: str) -> None:
    (run / name).unlink()
    if kind == "link":
        (run / name).symlink_to(run.parent / "victim" / "thesis.txt")
    elif kind == "pipe":
        os.mkfifo(run / name)
    else:
        (run / name).mkdir()
    done = CliRunner().invoke(app, ["export", str(run), "--redo"])  # a hang is a failure
    assert done.exit_code == 3, done.output
    assert name.split("/")[-1] in done.output
    if name == ".lock":
        assert CliRunner().invoke(app, ["status", str(run)]).exit_code == 3
    assert (run.parent / "victim" / "thesis.txt").read_text() == "years of work"


def test_unfinished_work_with_a_link_in_it_is_not_gone_on_with(run: Path, tmp_path: Path) -> None:
    opened, made_for = Run.open(run), MadeFor("abc")
    (opened.work("05-export", made_for) / "metrics.jsonl").symlink_to(tmp_path / "victim" / "thesis.txt")
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl"):
        opened.work("05-export", made_for)
    assert opened.work("05-export", MadeFor("other")).is_dir(), "begun again, the link goes and not what it leads to"
    assert (tmp_path / "victim" / "thesis.txt").read_text() == "years of work"


def test_what_a_temporary_name_leads_to_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / f".dial.json.{os.getpid()}.partial").symlink_to(tmp_path / "thesis.txt")
    atomic_write(tmp_path / "dial.json", "{}")
    assert (tmp_path / "dial.json").read_text() == "{}" and not (tmp_path / "dial.json").is_symlink()
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_names_that_a_run_does_not_give_are_left_alone(run: Path) -> None:
    mine = [".old-notes", ".staging-area", ".draft.partial", ".work-in-progress", "03-finetune.unknown-2"]
    for name in mine:
        (run / name).mkdir()
        (run / name / "notes.txt").write_text("mine")
    for name in ("03-finetune", "03-finetune"):  # unknown to the ledger: kept under the next free number
        tamper(run, lambda content: content["stages"].clear())
        with Run.open(run).lock():
            staged = Run.open(run)
            staged.new_staging(name)
            record = replace(fake_stages.sample_record("finetune", name), outputs=())
            staged.publish(record)
    assert [(run / name / "notes.txt").read_text() for name in mine] == ["mine"] * len(mine)
    kept = sorted(path.name for path in run.glob("03-finetune.unknown-*"))
    assert kept == ["03-finetune.unknown-1", "03-finetune.unknown-2", "03-finetune.unknown-3"]


@pytest.mark.parametrize("call", ["_remove", "_set_aside", "_finish", "publish", "new_staging", "work", "discard"])
@pytest.mark.parametrize("folder", ["{victim}", "../victim", "05-export", ".work/05-export"])
def test_the_functions_that_move_and_delete_cannot_act_outside(run: Path, call: str, folder: str) -> None:
    """Second defence: whatever they are called with, also where the run is not checked again."""
    victim = run.parent / "victim"
    opened = Run.open(run)
    folder = folder.format(victim=victim)
    if folder.startswith((".work", "05")):
        shutil.rmtree(run / folder, ignore_errors=True)
        (run / folder).symlink_to(victim)
    (run / ".staging-05-export").mkdir()
    before, record = tree(victim), replace(opened.manifest.stages[4], folder=folder)
    opened.manifest.stages[4] = record
    calls: dict[str, Callable[[], object]] = {
        "_remove": lambda: opened._remove(run / folder),
        "_set_aside": lambda: opened._set_aside(run / folder),
        "_finish": lambda: opened._finish(record),
        "publish": lambda: opened.publish(record),
        "new_staging": lambda: opened.new_staging(folder),
        "work": lambda: opened.work(folder, MadeFor("abc")),
        "discard": lambda: opened.discard_staging(folder),
    }
    harmless = (FileNotFoundError, FileExistsError, NotADirectoryError)
    try:
        calls[call]()
    except (ArtifactError, *harmless):
        pass
    assert tree(victim) == before
    assert [path.name for path in run.parent.iterdir()].count("victim") == 1


def places(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything within JSON ``content``."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in items:
        yield (*at, name)
        yield from places(value, (*at, name))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([10**400, -1, float("nan"), 1e308 * 10, "", "..", "/"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60)
@given(data=st.data())
def test_any_value_in_any_field_is_used_or_refused_in_one_clear_error(finished: Path, data: st.DataObject) -> None:
    original = (finished / MANIFEST_FILE).read_text()
    content = json.loads(original)
    content["publishing"] = data.draw(st.sampled_from([None, content["stages"][4]]))
    place = data.draw(st.sampled_from(sorted(places(content), key=str)))
    inner = content
    for name in place[:-1]:
        inner = inner[name]
    if data.draw(st.booleans()):
        inner[place[-1]] = data.draw(JSON)
    else:
        del inner[place[-1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "STAGES", FAKES)
        try:
            (finished / MANIFEST_FILE).write_text(json.dumps(content))
            try:
                status(Run.open(finished))
            except DynaconvError:
                return
            shown = CliRunner().invoke(app, ["status", str(finished)])
            assert shown.exit_code == 0, f"{place}: {shown.exception!r}"
        finally:
            (finished / MANIFEST_FILE).write_text(original)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("folder", 5, "text"),
        ("outputs", {"path": "x"}, "a list"),
        ("outputs", ["x"], "path, bytes, sha256"),
        ("outputs", [{"path": "x", "bytes": "3", "sha256": ""}], "a whole number"),
        ("fingerprint_fields", "x", "an object"),
        ("inputs", {"dense": {"id": 1}}, "text"),
        ("parents", "x", "a list"),
        ("superseded", 1, "true or false"),
        ("seconds", "fast", "a number"),
        ("seconds", float("nan"), "finite"),
        ("peak_rss_bytes", -1, "0 or more"),
        ("stage", "profile", "each stage once"),
        ("stage", "../x", "letters"),
        ("more", 1, "an object with"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(run: Path, field: str, value: Any, expected: str) -> None:
    def change(content: dict[str, Any]) -> None:
        content["stages"][4][field] = value
        if value == "profile":
            content["stages"][4]["folder"] = "05-profile"

    tamper(run, change)
    with pytest.raises(ArtifactError) as caught:
        Manifest.load(run)
    assert str(caught.value.where).startswith(f"{run / MANIFEST_FILE}, field stages[4].{field}")
    assert expected in str(caught.value.expected)
    assert caught.value.hint


def test_lists_without_end_are_refused(run: Path) -> None:
    (run / MANIFEST_FILE).write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match="not valid JSON"):
        Run.open(run)


def test_a_damaged_note_of_unfinished_work_is_refused(run: Path) -> None:
    Run.open(run).work("05-export", MadeFor("abc"))
    (run / ".work" / "05-export" / "state").write_text("half way")
    for content in ("[]", "{}", '{"fingerprint": 5}', '{"fingerprint": "x", "fields": []}'):
        (run / ".work" / "05-export" / WORK_MARK).write_text(content)
        with pytest.raises(ArtifactError, match="begin the stage again"):
            status(Run.open(run))
