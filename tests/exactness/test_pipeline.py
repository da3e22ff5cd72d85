"""From a dense checkpoint to an exported folder: every family, and every router target, loads everywhere the same."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_families import FAMILIES
from tiny_run import convert, documents_file, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

import dynaconv
from dynaconv.artifacts.files import read_json
from dynaconv.dynamic.recorder import Recorder
from dynaconv.errors import ExportError
from dynaconv.export.check import check

Maker = Callable[..., Path]


SETTINGS: dict[str, dict[str, object]] = {
    "llama": {"tied": True, "dtype": torch.bfloat16},
    "mistral": {"head_dim": 24},
    "qwen2": {"ffn": 67},
    "qwen3": {"kv_heads": 1},
    "gpt2": {"tied": True},
    "opt": {"tied": True, "ffn": 67},
}
ROUTERS = itertools.cycle(("width", "curve", "class", "uniform"))


@pytest.mark.parametrize(("family", "router"), [*zip(sorted(FAMILIES), ROUTERS, strict=False), ("opt", "curve")])
def test_converted_folder_loads_everywhere(
    tiny_checkpoint: Maker, tmp_path: Path, text_file: Path, family: str, router: str
) -> None:
    settings = SETTINGS.get(family, {})
    source = tiny_checkpoint(family, **settings)
    config = tiny_config(source, documents_file(tmp_path, text_file), router=router, check=True)
    folder = convert(config, tmp_path / "run")[-1].folder  # export.check reloads it without dynaconv and compares
    parent_config, config_json = read_json(source / "config.json"), read_json(folder / "config.json")
    for name, value in parent_config.items():
        assert config_json[name] == value, name
    assert AutoTokenizer.from_pretrained(folder)("abc")["input_ids"]
    assert (folder / "generation_config.json").is_file()
    card = (folder / "README.md").read_text()
    assert ("| dense parent |" in card and str(config.finetune.router) in card) or router == "uniform"
    model = dynaconv.load(folder)
    assert model.dtype == settings.get("dtype", torch.float32)
    assert model.layout.lineage["stages"].keys() == {"profile", "carve", "finetune", "calibrate"}
    ids = torch.randint(1, 257, (2, 6), generator=torch.Generator().manual_seed(0))
    out = model.generate(ids, dial=[0.25, 1.0], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape[1] > 6


def test_carved_only_is_the_parent_and_has_a_dial(tiny_checkpoint: Maker, tmp_path: Path, text_file: Path) -> None:
    source = tiny_checkpoint("llama")
    config = tiny_config(source, documents_file(tmp_path, text_file))
    config.stages = ["profile", "carve", "calibrate", "export"]
    folder = convert(config, tmp_path / "run")[-1].folder
    parent = AutoModelForCausalLM.from_pretrained(source).eval()
    ids = torch.randint(1, 257, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = parent(ids).logits
        got = dynaconv.load(folder).eval()(ids, dial=1.0).logits
        stock = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
    for logits in (got, stock):
        assert float((logits - expected).abs().max() / expected.abs().max()) <= 1e-5
    frontier = read_json(folder / "frontier.json")["frontier"]
    assert frontier[-1]["quality"] == pytest.approx(1.0, abs=1e-4)
    assert frontier[0]["active_share"] < 0.5


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_routed_experts_are_the_parent_and_have_a_dial(
    tiny_checkpoint: Maker, tmp_path: Path, text_file: Path, family: str
) -> None:
    source = tiny_checkpoint(family, ffn=96)
    config = tiny_config(source, documents_file(tmp_path, text_file), check=True)
    config.experts, config.blocks, config.block_size, config.finetune.uniform_share = "routed", None, 6, 0.25
    carved = convert(config, tmp_path / "run", until="carve")[-1].folder
    folder = convert(config, tmp_path / "tuned")[-1].folder
    parent = AutoModelForCausalLM.from_pretrained(source).eval()
    ids = torch.randint(1, 257, (3, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = parent(ids).logits
        for load in (dynaconv.load, AutoModelForCausalLM.from_pretrained):
            got = load(carved).eval()(ids).logits
            assert float((got - expected).abs().max() / expected.abs().max()) <= 1e-5
    model = dynaconv.load(folder).eval()
    assert model.layout.router.kind == "linear" and model.layout.blocks == 16
    spent = []
    for budget in (0.25, 0.5, 0.75, 1.0):
        recorder = Recorder()
        with torch.no_grad(), model.call.using(model.policy(budget), recorder):
            model(ids)
        spent.append(float(recorder.all_shares().mean()))
    assert spent == sorted(spent) and spent[0] < 0.45 and spent[-1] == 1.0
    points = read_json(folder / "frontier.json")["frontier"]
    assert [point["bytes_share"] for point in points] == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=0.06)


@pytest.mark.parametrize(("family", "stages"), [("llama", "tune"), ("gpt2", "tune"), ("opt", "default")])
def test_single_neurons_have_a_dial_tuned_or_not(
    tiny_checkpoint: Maker, tmp_path: Path, text_file: Path, family: str, stages: str
) -> None:
    source = tiny_checkpoint(family, ffn=67)
    config = tiny_config(source, documents_file(tmp_path, text_file), check=True)
    config.experts, config.blocks, config.finetune.budgets, config.calibrate.budgets = "neurons", None, None, None
    config.finetune.losses.distill.weight = config.finetune.losses.distill_full.weight = 1.0
    if stages == "default":
        config.stages.remove("finetune")
    folder = convert(config, tmp_path / "run")[-1].folder  # export.check reloads it without dynaconv and compares
    model, ids = (
        dynaconv.load(folder).eval(),
        torch.randint(1, 257, (3, 30), generator=torch.Generator().manual_seed(0)),
    )
    assert model.layout.router.kind == "sketch" and model.layout.means and model.layout.dial.exact
    points = read_json(folder / "frontier.json")["frontier"]
    budgets = [point["budget"] for point in points]
    assert len(budgets) > 2 and budgets == sorted(budgets) and budgets[-1] == 1.0
    for name in ("bytes_share", "flops_share", "active_share", "exact_share"):
        shares = [point[name] for point in points]
        assert all(a <= b + 0.02 for a, b in itertools.pairwise(shares[:-1])) and shares[-1] == 1.0, name
    met = [point["bytes_share"] == pytest.approx(point["budget"], abs=0.06) for point in points]
    assert all(met) if family != "opt" else met[0]  # ReLU leaves nothing to spend more on
    assert points[-1]["exact_share"] == 1.0 and points[0]["exact_share"] < points[0]["active_share"]
    assert all(point["exact_share"] <= point["active_share"] for point in points)
    with torch.no_grad():
        full, low = model(ids).logits, model(ids, dial=budgets[0]).logits
        stock = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
    assert torch.equal(full, stock) and low.isfinite().all() and not torch.equal(low, full)
    out = model.generate(ids[:2], dial=[budgets[0], 1.0], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape[1] > 30
    if stages == "tune":
        lines = (tmp_path / "run" / "03-finetune" / "metrics.jsonl").read_text().splitlines()
        spent = [json.loads(line)["share_spent"] for line in lines]
        assert len(spent) == 12 and all(0 < share < 1 for share in spent)


def test_the_check_notices_a_wrong_folder(tiny_checkpoint: Maker, tmp_path: Path, text_file: Path) -> None:
    config = tiny_config(tiny_checkpoint("llama"), documents_file(tmp_path, text_file))
    folder = convert(config, tmp_path / "run")[-1].folder
    code = folder / "dynaconv_routers_width.py"
    code.write_text(code.read_text() + "\n\nWidthRouter.soft_cap = lambda self, raw: raw + 1.0\n")
    with pytest.raises(ExportError, match="something else") as caught:
        check(folder, 0.5)
    assert caught.value.exit_code == 5
    code.write_text("import dynaconv\n")
    with pytest.raises(ExportError, match="clean process"):
        check(folder, 0.5)
