"""``convert``, ``plan``, ``status`` and the stages' own commands, on a tiny checkpoint from end to end."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import make_checkpoint

DYNACONV = [sys.executable, "-c", "from dynaconv.cli.app import main; main()"]
STAGES = ["profile", "carve", "finetune", "calibrate", "export"]
TRAINING_FREE = [
    "data.sequence_length=32",
    "profile.tokens=512",
    "calibrate.budgets=[0.5]",
    "calibrate.tokens=128",
    "calibrate.score_tokens=128",
    "calibrate.speed_tokens=0",
]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_from_end_to_end(dynaconv: Callable, converted: Path) -> None:
    ran = dynaconv("status", converted, "--json")
    stages = json.loads(ran.out)["stages"]
    assert [(stage["name"], stage["status"]) for stage in stages] == [(name, "done") for name in STAGES]
    for stage in stages:
        assert {"name", "status", "fingerprint", "outputs", "metrics", "seconds", "peak_rss_bytes"} <= set(stage)
        assert stage["outputs"]
        assert stage["peak_rss_bytes"] > 0
    assert ran.err == ""
    table = dynaconv("status", converted).out
    assert all(name in table for name in STAGES)


def test_the_same_again_keeps_everything(dynaconv: Callable, converted: Path) -> None:
    before = files(converted)
    ran = dynaconv("convert", converted, "--json")
    assert ran.code == 0
    assert ran.err == "", "--json prints nothing but JSON"
    assert {stage["status"] for stage in json.loads(ran.out)["stages"]} == {"done"}
    after = files(converted)
    assert {name: text for name, text in before.items() if "logs" not in name} == {
        name: text for name, text in after.items() if "logs" not in name
    }


def test_a_changed_setting_stops_and_is_named(dynaconv: Callable, converted: Path) -> None:
    before = files(converted)
    ran = dynaconv("convert", converted, "finetune.tokens=512")
    assert (ran.code, ran.out) == (3, "")
    assert "finetune.tokens: 256 -> 512" in ran.err
    assert "--redo finetune" in ran.err
    assert files(converted)["manifest.json"] == before["manifest.json"]


def test_plan_writes_nothing_and_says_what_is_kept(
    dynaconv: Callable, converted: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = files(converted)
    plan = json.loads(dynaconv("plan", converted, "calibrate.budgets=[0.5]", "--json").out)
    assert [stage["action"] for stage in plan["stages"]] == ["keep", "keep", "keep", "stale", "stale"]
    assert plan["problems"] == []
    fresh = json.loads(dynaconv("plan", dense, "--recipe", "tune", "--json").out)
    assert {stage["action"] for stage in fresh["stages"]} == {"make"}
    assert fresh["peak_bytes"] > 0
    shown = dynaconv("plan", dense, "--recipe", "tune")
    assert shown.code == 0
    assert "05-export" in shown.out
    assert files(converted) == before
    assert list(tmp_path.iterdir()) == []


def test_plan_lists_every_mistake(dynaconv: Callable, tmp_path: Path) -> None:
    ran = dynaconv("plan", tmp_path / "absent", "block=3", "seed=-1", "stages=carve,profile", "data=/not/there")
    assert ran.code == 2
    for part in ("'block'", "seed is -1", "carve needs statistics", "no such folder", "4 mistakes"):
        assert part in ran.err
    as_json = dynaconv("plan", tmp_path / "absent", "block=3", "--json")
    assert (as_json.code, as_json.err) == (2, "")
    assert len(json.loads(as_json.out)["problems"]) == 2


def test_plan_without_a_source_makes_none(dynaconv: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNACONV_CACHE", str(tmp_path / "cache"))
    ran = dynaconv("plan")
    assert ran.code == 3
    assert "not made yet" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_one_stage_at_a_time(dynaconv: Callable, converted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(converted, run)
    kept = dynaconv("calibrate", run)
    assert kept.code == 0
    assert "kept" in kept.err
    changed = dynaconv("calibrate", run, "calibrate.budgets=[0.5]", "--json")
    assert changed.code == 0, changed.err
    states = {stage["name"]: stage["status"] for stage in json.loads(changed.out)["stages"]}
    assert states == {**dict.fromkeys(STAGES, "done"), "export": "stale"}
    assert [row["budget"] for row in json.loads(dynaconv("dial-k", run, "--json").out)["frontier"]] == [0.5, 1.0]
    assert dynaconv("export", run, "--redo").code == 0
    wrong = dynaconv("carve", run, "block_size=48")
    assert wrong.code == 3
    assert "block_size: 24 -> 48" in wrong.err, "profile was made for blocks of 24"


def test_a_stage_without_a_run(dynaconv: Callable, tmp_path: Path) -> None:
    ran = dynaconv("carve", tmp_path / "absent")
    assert ran.code == 3
    assert "source=SOURCE" in ran.err
    assert not (tmp_path / "absent").exists()


def test_until_stops_there_and_the_rest_goes_on(
    dynaconv: Callable, dense: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments = [dense, "--out", tmp_path / "run", *TRAINING_FREE, f"data={text_file}", "data.validation_share=0.5"]
    assert dynaconv("convert", *arguments, "--until", "carve").code == 0
    states = [stage["status"] for stage in json.loads(dynaconv("status", tmp_path / "run", "--json").out)["stages"]]
    assert states == ["done", "done", "pending", "pending"]
    assert dynaconv("generate", tmp_path / "run", "--prompt", "def", "--max-new-tokens", "2").code == 0


def test_the_terminal_stays_quiet(dense: Path, text_file: Path, tmp_path: Path) -> None:
    """Libraries, as they really load in a fresh process, print nothing; what is left is our progress."""
    arguments = [dense, "--out", tmp_path / "run", *TRAINING_FREE, f"data={text_file}", "data.validation_share=0.5"]
    ran = subprocess.run([*DYNACONV, "convert", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    strange = [
        line for line in ran.stderr.splitlines() if not re.match(r"\d/4 (profile|carve|calibrate|export)\b", line)
    ]
    assert strange == []
    assert "dial-k" in ran.stdout


def break_nothing(folder: Path) -> None:
    shutil.rmtree(folder)


def break_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))


def break_format(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def break_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 100}))


def break_length(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def break_values(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (break_nothing, "no such folder"),
        (break_config, "config.json"),
        (break_family, "did you mean 'llama'"),
        (break_format, "pickle"),
        (break_shape, "mlp.up_proj.weight"),
        (break_length, "model.safetensors"),
        (break_values, "model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_bad_source_gets_one_clear_message(
    dynaconv: Callable, tmp_path: Path, text_file: Path, damage: Callable[[Path], None], said: str
) -> None:
    source = make_checkpoint(tmp_path / "parent")
    damage(source)
    ran = dynaconv("convert", source, "--out", tmp_path / "run", *TRAINING_FREE, f"data={text_file}")
    assert (ran.code, ran.out) == (3, "")
    assert said in ran.err
    assert ran.err.count("error: ") == 1


@pytest.mark.parametrize("text", ["", "x = 1\n"], ids=["empty", "too small"])
def test_bad_text_gets_one_clear_message(dynaconv: Callable, tmp_path: Path, dense: Path, text: str) -> None:
    (tmp_path / "text.txt").write_text(text)
    ran = dynaconv("convert", dense, "--out", tmp_path / "run", *TRAINING_FREE, f"data={tmp_path / 'text.txt'}")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("error: ") == 1
