"""``bench``: what it prints, at which dials, and what it refuses. No figure that depends on the clock is looked at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynaconv.dynamic.layout import Layout
from dynaconv.evaluation import bench, bench_models, shapes

QUICK = ["--tokens", 3, "--prompt", 4, "--rounds", 1, "--threads", 1]
SPEED = {
    "dial",
    "tokens_per_s",
    "first_token_s",
    "bytes_per_step",
    "ffn_bytes_share",
    "promised",
    "measured",
    "bandwidth_share",
    "path",
    "reason",
}
TINY = {
    **shapes.SHAPES["llama-1b"],
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BUFFER", 8000)
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)


def measured(dynaconv: Callable, *arguments: object) -> dict[str, Any]:
    ran = dynaconv("bench", *arguments, *QUICK, "--json")
    assert (ran.code, ran.err) == (0, ""), ran.err
    return json.loads(ran.out)


def test_a_run_is_measured_at_its_calibrated_dials(dynaconv: Callable, converted: Path) -> None:
    content = measured(dynaconv, converted)
    assert [one["dial"] for one in content["dials"]] == [0.25, 0.5, 1.0]
    assert all(set(one) == SPEED for one in (content["parent"], *content["dials"]))
    assert content["parent"]["dial"] is None
    assert (content["batch"], content["prompt"], content["tokens"], content["rounds"]) == (1, 4, 3, 1)
    assert (content["dtype"], content["threads"], content["model"]) == ("float32", 1, str(converted))
    exported = measured(dynaconv, converted / "05-export")
    assert [one["bytes_per_step"] for one in exported["dials"]] == [one["bytes_per_step"] for one in content["dials"]]


def test_dials_are_asked_for_once_each_and_in_order(dynaconv: Callable, converted: Path) -> None:
    content = measured(dynaconv, converted, "--dials", "full, 0.4,0.25,1,0.4", "--batch", 2)
    assert [one["dial"] for one in content["dials"]] == [0.25, 0.4, 1.0]
    reads = [one["bytes_per_step"] for one in content["dials"]]
    assert reads == sorted(reads) and reads[-1] == content["parent"]["bytes_per_step"]


def test_weights_in_another_dtype(dynaconv: Callable, converted: Path) -> None:
    whole, half = (measured(dynaconv, converted, "--dials", "full", "--dtype", name) for name in ("fp32", "bf16"))
    assert half["dtype"] == "bfloat16"
    assert 2 * half["parent"]["bytes_per_step"] == whole["parent"]["bytes_per_step"]


def test_the_prompt_is_cut_from_a_text(dynaconv: Callable, converted: Path, tmp_path: Path, monkeypatch: Any) -> None:
    seen = []
    cut = bench_models.prompt_of
    monkeypatch.setattr(bench_models, "prompt_of", lambda text, *rest: seen.append(text) or cut(text, *rest))
    (tmp_path / "text.txt").write_text("def main():\n")
    measured(dynaconv, converted, "--dials", "full", "--text", tmp_path / "text.txt")
    measured(dynaconv, converted, "--dials", "full")
    assert seen == ["def main():\n", bench_models.TEXT]


def test_a_shape_is_measured_without_a_model(dynaconv: Callable) -> None:
    content = measured(dynaconv, "--shape", "tiny", "--dials", "0.6,full")
    assert content["model"] == "tiny, random weights"
    assert content["dtype"] == "bfloat16"
    assert [one["dial"] for one in content["dials"]] == [0.6, 1.0]
    assert [one["path"] for one in content["dials"]][-1] == "dense"


def test_a_cut_shape_says_so(dynaconv: Callable) -> None:
    ran = dynaconv("bench", "--shape", "tiny", "--layers", 1, "--vocab", 100, "--dials", "0.6", *QUICK)
    assert ran.code == 0, ran.err
    told = "tiny, cut to 1 of 3 layers and 100 of 300 tokens of vocabulary, random weights, bfloat16"
    assert ran.out.startswith(told)


def test_the_table_fits_80_columns(on_terminal: Callable, converted: Path) -> None:
    lines = on_terminal(80, "bench", converted, *QUICK)
    first, last = (number for number, line in enumerate(lines) if not line)
    assert max(map(len, lines[first:last])) <= 80
    assert not any("Left out" in line for line in lines)
    start = next(number for number, line in enumerate(lines) if "──" in line)
    assert all(name in " ".join(lines[first:start]) for name in ("tokens/s", "promised", "measured", "memory", "path"))
    paths = {line.split()[0]: " ".join(line.split()[-2:]) for line in lines[start + 1 : last] if "%" in line}
    assert list(paths) == ["parent", "0.25", "0.5", "1"]
    assert paths["parent"].endswith(" stock") and paths["1"].endswith(" dense")
    assert paths["0.25"].split()[-1].startswith("cpu-routed"), "of a path of two words, the first is in the first line"
    assert any(line.startswith("Path dense: ") for line in lines)


def test_the_picture_is_written_and_named(dynaconv: Callable, converted: Path, tmp_path: Path) -> None:
    ran = dynaconv("bench", converted, "--dials", "full", *QUICK, "--picture", tmp_path / "speed.png")
    assert ran.out.endswith(f"Picture: {tmp_path / 'speed.png'}\n")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "nothing to measure"),
        (["MODEL", "--shape", "tiny"], 2, "a model and a shape are given"),
        (["--shape", "tinny"], 2, "did you mean 'tiny'?"),
        (["--shape", "tiny", "--layers", 4], 2, "tiny has 3"),
        (["--shape", "tiny", "--vocab", 301], 2, "tiny has 300"),
        (["--shape", "tiny", "--text", "x"], 2, "--text needs a model"),
        (["--shape", "tiny", "--dials", "0.5,half"], 2, "--dials is 'half'"),
        (["--shape", "tiny", "--dials", "0.01"], 2, "the routers alone"),
        (["MODEL", "--layers", 1], 2, "cut shapes, not models"),
        (["MODEL", "--dials", "0"], 2, "--dials is '0'"),
        (["MODEL", "--dials", "0.1"], 4, "0.25 or more"),
        (["MODEL", "--text", "absent.txt"], 2, "no such file"),
        (["MODEL", "--picture", "absent/speed.png"], 2, "the picture cannot be written"),
        (["MODEL", "--picture", "speed.doc"], 2, ".png, .svg, .pdf"),
        (["MODEL", "--tokens", 1000], 2, "too long for this model"),
        (["absent"], 3, "no such folder"),
    ],
)
def test_what_cannot_be_measured(
    dynaconv: Callable, converted: Path, arguments: list[object], code: int, said: str
) -> None:
    given = [converted if one == "MODEL" else one for one in arguments]
    ran = dynaconv("bench", "--json", "--threads", 1, *given)
    assert (ran.code, ran.out) == (code, ""), ran.err
    assert said in ran.err
    assert "  try: " in ran.err or "  expected: " in ran.err, "it says what to do"


def test_a_model_without_a_dial(dynaconv: Callable, converted: Path) -> None:
    carved = converted / "02-carve"
    assert Layout.load(carved).dial is None
    for dials in ([], ["--dials", "0.5"]):
        ran = dynaconv("bench", carved, *dials, *QUICK, "--json")
        assert (ran.code, ran.out) == (3, "")
        assert "no calibrated dial" in ran.err and "--dials full" in ran.err
    assert [one["dial"] for one in measured(dynaconv, carved, "--dials", "full")["dials"]] == [1.0]


def test_too_little_memory(dynaconv: Callable, converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_models, "free_bytes", lambda device: 200_000)
    for arguments, tip in (([converted], "--dtype bf16"), (["--shape", "tiny"], "--layers 1")):
        ran = dynaconv("bench", *arguments, *QUICK, "--json")
        assert (ran.code, ran.out) == (2, "")
        assert "not enough memory" in ran.err and tip in ran.err
