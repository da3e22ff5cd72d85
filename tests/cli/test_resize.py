"""``subclone`` and ``hyperclone`` as a user runs them: what comes out, what is recorded, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_checkpoint
from typer.testing import CliRunner

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.artifacts.files import read_json
from dynaconv.cli.app import app

Make = Callable[..., Path]
TINY_RUN = (
    "blocks=4",
    "profile.tokens=512",
    "finetune.tokens=1024",
    "finetune.batch_size=4",
    "finetune.wandb=off",
    "finetune.router_rank=4",
    "calibrate.budgets=[0.5]",
    "calibrate.tokens=512",
    "calibrate.score_tokens=512",
    "calibrate.speed_tokens=0",
    "export.check=false",
    "data.validation_share=0.3",
)
SMALL = ("importance.tokens=512", "data.sequence_length=64")


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def stage_metrics(folder: Path, stage: str) -> dict[str, Any]:
    records = read_json(folder / "manifest.json")["stages"]
    return next(record["metrics"] for record in records if record["stage"] == stage)


def test_hyperclone_leaves_a_plain_checkpoint_with_card_and_tokenizer(tmp_path: Path, tiny_checkpoint: Make) -> None:
    source, out = tiny_checkpoint(tied=True), tmp_path / "run"
    code, said, _ = run("hyperclone", source, "--out", out, "--factor", "2", "layers=3")
    assert code == 0
    folder = out / "01-hyperclone"
    assert str(folder) in said
    found = stage_metrics(out, "hyperclone")
    assert found["relative_difference"] <= 1e-5
    assert found["agreement"] == 1
    assert (found["from"]["residual"], found["to"]["residual"], found["to"]["layers"]) == (64, 128, 3)
    result = Checkpoint.open(folder)
    assert result.parameters == found["parameters"] == found["to"]["parameters"]
    for name in ("tokenizer.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    card = (folder / "README.md").read_text()
    assert "| residual | 64 | 128 |" in card
    assert source.name in card


def test_rerunning_keeps_and_redo_makes_again(tmp_path: Path, tiny_checkpoint: Make) -> None:
    source, out = tiny_checkpoint(), tmp_path / "run"
    command = ("hyperclone", source, "--out", out, "ffn=1.5")
    assert run(*command)[0] == 0
    weights = out / "01-hyperclone" / "model.safetensors"
    first = weights.read_bytes()
    assert "kept" in run(*command)[2]
    code, _, stale = run("hyperclone", source, "--out", out, "ffn=2")
    assert code == 3
    assert "hyperclone.ffn: 1.5 -> 2" in stale
    assert weights.read_bytes() == first
    assert run("hyperclone", source, "--out", out, "ffn=2", "--redo")[0] == 0
    assert Checkpoint.open(weights.parent).sizes["ffn"] == 192
    assert run(*command, "--redo")[0] == 0
    assert weights.read_bytes() == first


def test_subclone_measures_cuts_and_says_what_it_kept(tmp_path: Path, tiny_checkpoint: Make, text_file: Path) -> None:
    source, out = tiny_checkpoint(heads=8, kv_heads=4), tmp_path / "run"
    code, said, _ = run("subclone", source, "--out", out, "ratio=0.5", f"data={text_file}", *SMALL)
    assert code == 0
    found = stage_metrics(out, "subclone")
    assert found["to"] | {"parameters": 0, "vocab": 0, "head_dim": 0} == {
        "layers": 2,
        "residual": 32,
        "ffn": 48,
        "heads": 4,
        "kv_heads": 2,
        "parameters": 0,
        "vocab": 0,
        "head_dim": 0,
    }
    assert found["source_loss"] > 0
    assert found["result_loss"] > 0
    assert str(out / "02-subclone") in said
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out / "02-subclone")
    assert bool(torch.isfinite(model(torch.arange(40)[None]).logits).all())


def test_a_new_target_does_not_measure_again(tmp_path: Path, tiny_checkpoint: Make, text_file: Path) -> None:
    source, out = tiny_checkpoint(), tmp_path / "run"
    common = ("subclone", source, "--out", out, f"data={text_file}", *SMALL)
    assert run(*common, "ffn=64")[0] == 0
    code, _, said = run(*common, "ffn=32", "--redo")
    assert code == 0
    assert "importance  kept" in said
    assert Checkpoint.open(out / "02-subclone").sizes["ffn"] == 32


def test_plan_shows_the_new_shape_and_writes_nothing(tmp_path: Path, tiny_checkpoint: Make, text_file: Path) -> None:
    source, out = tiny_checkpoint(), tmp_path / "run"
    code, said, _ = run("hyperclone", source, "--out", out, "--factor", "2", "--plan")
    assert code == 0
    for text in ("residual 64 -> 128", "parameters", "GFLOPs", "about"):
        assert text in said
    code, said, _ = run("subclone", source, "--out", out, "ratio=0.5", f"data={text_file}", "--plan", "--json")
    stages = json.loads(said)["stages"]
    assert [stage["name"] for stage in stages] == ["importance", "subclone"]
    assert stages[1]["estimate"]["disk_bytes"] < sum(path.stat().st_size for path in source.iterdir())
    assert not out.exists()


def test_plan_of_later_stages_is_of_the_new_shape(tmp_path: Path, tiny_checkpoint: Make, text_file: Path) -> None:
    plans = {}
    for factor in (1, 2):
        out = tmp_path / f"run{factor}"
        arguments = ("plan", tiny_checkpoint(ffn=512), "--out", out, "--recipe", "hyperclone-then-finetune", "--json")
        _, said, _ = run(
            *arguments, f"hyperclone.ffn={factor}", "hyperclone.factor=1", f"data={text_file}", "hyperclone.layers=3"
        )
        plans[factor] = {stage["name"]: stage["estimate"] for stage in json.loads(said)["stages"]}
    for stage in ("profile", "carve", "finetune", "export"):
        assert plans[2][stage]["disk_bytes"] > plans[1][stage]["disk_bytes"], stage
    assert any("1024 neurons" in note for note in plans[2]["carve"]["notes"])


REFUSED = [
    (("hyperclone", "--factor", "1.5"), "factor is 1.5, and must be whole"),
    (("hyperclone", "residual=2.5"), "residual is 2.5, and must be whole"),
    (("hyperclone",), "nothing would grow"),
    (("hyperclone", "residul=2"), "did you mean 'residual'?"),
    (("hyperclone", "residual=3", "heads=3", "kv_heads=5"), "kv_heads"),
    (("hyperclone", "ffn=0.5"), "at least 1"),
    (("hyperclone", "variant=nosy"), "'noisy'?"),
    (("hyperclone", "layers=1"), "layers"),
    (("subclone",), "subclone has no target"),
    (("subclone", "residual=128"), "residual is 128, the source has 64"),
    (("subclone", "layers=3"), "layers is 3, the source has 2"),
    (("subclone", "heads=3"), "heads"),
    (("subclone", "heads=3", "kv_heads=2"), "3 query heads cannot share 2 kv heads evenly"),
    (("subclone", "params=1e9", "ratio=0.5"), "leave out ratio"),
    (("subclone", "ratio=1.5"), "ratio is 1.5"),
    (("subclone", "ratio=0.5", "refit=true"), "importance.second_moments=true"),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain") / "model")


@pytest.mark.parametrize(("arguments", "said"), REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_written(
    plain: Path, tmp_path: Path, text_file: Path, arguments: tuple[str, ...], said: str
) -> None:
    out = tmp_path / "run"
    stage, *rest = arguments
    text = [f"data={text_file}", *SMALL] if stage == "subclone" else []
    code, _, error = run(stage, plain, "--out", out, *rest, *text)
    assert code == 2, error
    assert said in error
    assert not out.exists()


def test_a_quantised_checkpoint_is_refused(tmp_path: Path, tiny_checkpoint: Make) -> None:
    source = tiny_checkpoint()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    code, _, error = run("hyperclone", source, "--out", tmp_path / "run", "--factor", "2")
    assert code == 3
    assert "quantised" in error
    assert "gptq" in error


def test_sizes_that_kernels_dislike_are_warned_of(tmp_path: Path, tiny_checkpoint: Make) -> None:
    source = tiny_checkpoint(ffn=256)
    code, _, said = run("hyperclone", source, "--out", tmp_path / "run", "ffn=1.1")
    assert code == 0
    assert "warning" in said
    assert "282 neurons" in said


def test_a_carved_source_is_grown_as_the_plain_checkpoint_it_is(tmp_path: Path, tiny_checkpoint: Make) -> None:
    source = tiny_checkpoint()
    (source / "dynaconv.json").write_text("{}")
    code, _, said = run("hyperclone", source, "--out", tmp_path / "run", "ffn=2")
    assert code == 0
    assert "routers and dial of the source stay behind" in said


@pytest.mark.parametrize(
    ("recipe", "wanted", "residual"),
    [("subclone-then-nested", "subclone.ratio=0.5", 32), ("hyperclone-then-finetune", "hyperclone.factor=2", 128)],
)
def test_recipes_go_on_to_a_model_with_a_dial(
    tmp_path: Path, tiny_checkpoint: Make, text_file: Path, recipe: str, wanted: str, residual: int
) -> None:
    source, out = tiny_checkpoint(heads=8, kv_heads=4), tmp_path / "run"
    small = [*SMALL, *TINY_RUN, wanted, f"data={text_file}"]
    if "hyperclone" in recipe:
        small = [each for each in small if not each.startswith("importance")]
    code, _, error = run("convert", source, "--out", out, "--recipe", recipe, *small)
    assert code == 0, error
    import dynaconv

    (exported,) = out.glob("0?-export")
    model = dynaconv.load(exported)
    assert model.config.hidden_size == residual
    assert model(torch.arange(30)[None], dial=0.5).logits.shape == (1, 30, 257)
    frontier = read_json(exported / "frontier.json")
    full = next(row for row in frontier["frontier"] if row["budget"] == 1)
    assert frontier["parent"]["flops_per_token"] != pytest.approx(full["flops_per_token"], rel=0.2), (
        "source, not result"
    )
