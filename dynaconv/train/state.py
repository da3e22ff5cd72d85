"""Resumable state of a fine-tuning run: appears whole or not at all, holds all that the next step depends on.

A state is one folder ``state-<step>``: what the engine saves, the random state of every rank, and ``state.json``.
The data order and the dial are pure functions of seed and step, so the step is their state.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from dynaconv.artifacts.files import fsync_tree, read_json, storage_errors, write_json
from dynaconv.artifacts.fingerprint import HEX_SHOWN
from dynaconv.artifacts.run import MadeFor
from dynaconv.artifacts.tensors import read_tensors
from dynaconv.artifacts.writer import write_tensors
from dynaconv.errors import ArtifactError, StaleArtifactError
from dynaconv.train.engine import Engine

PREFIX = "state-"


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: Steps done.
        budget_error: State of the controller of the share that is spent.
        seconds: Training time so far.
    """

    step: int = 0
    budget_error: float = 0.0
    seconds: float = 0.0


def save_state(work: Path, engine: Engine, position: Position) -> None:
    """Writes the state after ``position.step`` steps into ``work``, then removes older ones. Every rank takes part."""
    ranks = engine.ranks
    folder = work / f"{PREFIX}{position.step:08d}"
    partial = work / f".{folder.name}"
    with storage_errors(work):
        if ranks.main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        ranks.barrier()
        engine.save(partial)
        random = {"cpu": torch.get_rng_state()}
        if engine.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(engine.device)
        write_tensors(partial / _random_file(ranks.rank), random)
        ranks.barrier()
        if ranks.main:
            content = {"engine": engine.kind, "world": ranks.world, "position": asdict(position), "run": _run(work)}
            write_json(partial / "state.json", content)
            fsync_tree(partial)
            partial.rename(folder)
            for old in work.glob(f"{PREFIX}*"):
                if old != folder:
                    shutil.rmtree(old, ignore_errors=True)
        ranks.barrier()


def has_state(work: Path) -> bool:
    """Whether there is a state in ``work`` to go on from."""
    return any(work.glob(f"{PREFIX}*"))


def load_state(work: Path, engine: Engine) -> Position:
    """Restores the newest state in ``work``; the beginning where there is none. Every rank takes part.

    Raises:
        StaleArtifactError: It is from another run, or made with other settings.
        ArtifactError: Another engine or version saved it, or another number of ranks where the engine needs the same.
    """
    folders = sorted(work.glob(f"{PREFIX}*"))
    if not folders:
        return Position()
    saved = read_json(folders[-1] / "state.json")
    if saved["run"] != _run(work):
        raise StaleArtifactError(
            "the saved training state is from another run or other settings",
            where=folders[-1],
            expected=f"fingerprint {_run(work)[:HEX_SHOWN]}",
            found=f"fingerprint {saved['run'][:HEX_SHOWN]}",
            hint="put it back where it came from, or remove this folder to begin again",
        )
    if set(saved["position"]) != {entry.name for entry in fields(Position)}:
        raise ArtifactError(
            "another version of dynaconv saved the training state",
            where=folders[-1],
            expected=", ".join(entry.name for entry in fields(Position)),
            found=", ".join(saved["position"]),
            hint="go on with that version, or remove this folder to begin again",
        )
    engine_and_world = (saved["engine"], saved["world"])
    same_world = saved["world"] == engine.ranks.world
    if saved["engine"] != engine.kind or not (same_world or engine.kind == "torch"):
        raise ArtifactError(
            "the saved training state does not fit how training goes on now",
            where=folders[-1],
            expected="engine {}, {} rank(s)".format(*engine_and_world),
            found=f"engine {engine.kind}, {engine.ranks.world} rank(s)",
            hint="go on with that engine and number of ranks, or remove this folder to begin again",
        )
    engine.load(folders[-1])
    own = folders[-1] / _random_file(engine.ranks.rank)
    if same_world:
        random = read_tensors(own)
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and engine.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], engine.device)
    return Position(**saved["position"])


def _run(work: Path) -> str:
    """Fingerprint of the inputs and settings that ``work`` belongs to; empty where nobody marked it."""
    made_for = MadeFor.of(work)
    return "" if made_for is None else made_for.fingerprint


def _random_file(rank: int) -> str:
    return f"random-{rank:05d}.safetensors"
