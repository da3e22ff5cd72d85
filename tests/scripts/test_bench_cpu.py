"""The CPU benchmark measures every case that it names, and stops at a wrong result."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dynaconv.evaluation import bench as speeds
from dynaconv.evaluation import bench_models, shapes

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TINY = {
    **shapes.SHAPES["llama-1b"],
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
OPTIONS = {"model": None, "shapes": "tiny", "shares": "0.6,0.4", "backends": "", "layers": 2, "blocks": False}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setattr(speeds, "BUFFER", 8000)
    import bench_cpu

    yield bench_cpu
    for name in ("bench_cpu", "cpu_blocks", "cpu_timing"):
        sys.modules.pop(name, None)


def test_every_case_is_measured(bench: Any, tmp_path: Path) -> None:
    bench.main(**OPTIONS, out=tmp_path / "cpu.json", dtypes="fp32,bf16", effort=0.01)
    report = json.loads((tmp_path / "cpu.json").read_text())
    found = [(row["dtype"], row["batch"], row["dial"]) for row in report["neurons"]]
    dials = {1: ["0.4", "0.6", "1"], 8: ["0.4", "0.6", "1", "own"]}
    assert found == [(dtype, b, dial) for dtype in ("float32", "bfloat16") for b in (1, 8) for dial in dials[b]]
    for row in report["neurons"]:
        assert set(row["milliseconds"]) == {"dense", "dynamic"} | ({"reference"} if row["dial"] != "1" else set())
        assert row["read_share"] >= row["bytes_share"] - 1e-4
        if row["dial"] not in ("own", "1"):
            assert row["bytes_share"] == pytest.approx(float(row["dial"]), abs=0.1)
    assert len(report["targets"]["dynamic"]) == len(found) + 4, "two more for one token at each dial below 1"


def test_a_wrong_result_is_not_timed(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = bench.Bench.dynamic
    monkeypatch.setattr(bench.Bench, "dynamic", lambda *given: right(*given) * 1.1)
    with pytest.raises(SystemExit, match=r"relative error .* batch 1, dial 0.4, dynamic"):
        bench.main(**OPTIONS, out=tmp_path / "cpu.json", dtypes="fp32", effort=0.01)
    assert not (tmp_path / "cpu.json").exists()


def test_what_is_asked_of_a_backend_is_what_the_router_is_asked(bench: Any) -> None:
    """Levels are sizes, of each token; the mean is that of the dial."""

    class Levels:
        def level(self, threshold: torch.Tensor) -> torch.Tensor:
            return threshold.exp()

    config = shapes.shape_config("tiny", layers=2)
    subject = bench_models.of_shape(config, [0.4, 0.6], speeds.Sizes(prompt=16), torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        made = bench.Bench("tiny", subject, [])
        made.sketch_routers = [Levels(), Levels()]
        bench.Asked = lambda *given: given
        policy = subject.model.policy(speeds.Dial(budget=0.4))
        level, exact, mean, base = made.asked(1, 3, policy)
        assert torch.equal(level, policy.thresholds[1].exp().expand(3))
        assert torch.equal(exact, policy.exact[1].exp().expand(3))
        ffn = made.ffns[1]
        assert torch.equal(mean, ffn.means[0])
        assert torch.allclose(base, ffn.means[0] @ ffn.weights().down.t())
