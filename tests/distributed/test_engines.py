"""Two CPU ranks do what one does, with every engine: losses, weights, resuming, and no waiting for each other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed.checks import BF16, ENGINES, FEW, FROZEN, NEURONS, OTHERS, STEPS, Bench, furthest, run, whole

from dynaconv.config import EngineConfig
from dynaconv.errors import ArtifactError
from dynaconv.ranks import Ranks
from dynaconv.train.state import load_state

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(HERE / "checks.py"), str(folder)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    result: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return result


def test_there_was_something_to_learn(found: dict[str, Any]) -> None:
    losses = found["alone"]["losses"]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.3
    assert found["alone"]["moved"] > 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_reproduce_one(found: dict[str, Any], engine: str) -> None:
    gaps = found[f"curve/{engine}"]
    assert gaps.pop("steps") == (FEW if "offload" in engine else STEPS)
    assert {"loss_full", "kl_dial", "share_spent", "gradient_norm", "weights"} <= set(gaps)
    del gaps["score_std"]  # each rank's own, averaged
    assert {name: gap for name, gap in gaps.items() if gap > 1e-4} == {}


@pytest.mark.parametrize("engine", BF16)
def test_bf16_is_what_one_rank_computes_in_bf16(found: dict[str, Any], engine: str) -> None:
    gaps = found[f"bf16/{engine}"]
    assert gaps["one rank"] < 2e-3
    assert 1e-6 < gaps["fp32"] < 2e-2


@pytest.mark.parametrize("family", ["-".join(names) for names in OTHERS])
def test_every_way_of_storing_a_network_can_be_taken_apart(found: dict[str, Any], family: str) -> None:
    assert max(found[f"family/{family}"].values()) < 1e-4


def test_two_ranks_reproduce_one_with_routed_experts(found: dict[str, Any]) -> None:
    assert {name: gap for name, gap in found["routed"].items() if gap > 1e-4} == {}


@pytest.mark.parametrize("which", ["-".join(names) for names in NEURONS])
def test_two_ranks_reproduce_one_with_single_neurons(found: dict[str, Any], which: str) -> None:
    gaps = found[f"neurons/{which}"]
    assert min(gaps.pop("moved").values()) > 3e-4, "what is compared was trained"
    assert {name: gap for name, gap in gaps.items() if gap > 1e-4} == {}


def test_thresholds_and_means_of_neurons_come_from_the_text_of_all_ranks(found: dict[str, Any]) -> None:
    assert found["neurons/solved"] < 1e-5


@pytest.mark.parametrize("trainable", FROZEN)
def test_what_is_frozen_can_be_taken_apart_too(found: dict[str, Any], trainable: str) -> None:
    assert max(found[f"frozen/{trainable}"].values()) < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_resume_is_exact(found: dict[str, Any], engine: str) -> None:
    assert found[f"resume/{engine}"] == {"losses": True, "weights": 0.0}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_whose_blocks_get_no_token_does_not_hang(found: dict[str, Any], engine: str) -> None:
    norm = found[f"starved/{engine}"]["gradient_norm"]
    assert 0 < norm < float("inf")
    assert norm == pytest.approx(found["starved/torch"]["gradient_norm"], rel=1e-4)


def test_another_number_of_processes_goes_on_or_is_refused(found: dict[str, Any], folder: Path) -> None:
    assert found
    bench = Bench(folder, Ranks.single("cpu"))
    made = bench.trainer(bench.checkpoint("llama", attention_dropout=0.1), EngineConfig(), bench.ranks, 4)
    before = whole(made.engine)
    assert load_state(folder / "work-torch", made.engine).step == 2
    assert furthest(before, whole(made.engine)) > 1e-5
    assert len(run(made, start=2)) == 2
    for kind in ("torch", "deepspeed-zero2"):  # another engine, and the same one with another number of processes
        made.engine.kind = kind
        with pytest.raises(ArtifactError, match=r"does not fit(.|\n)*deepspeed-zero2, 2(.|\n)*remove this folder"):
            load_state(folder / "work-zero2", made.engine)
