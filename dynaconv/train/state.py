"""Resumable state of a fine-tuning run: appears whole or not at all, holds all that the next step depends on.

A state is one folder ``state-<step>`` with ``state.safetensors`` (weights, optimiser, random state) and ``state.json``.
The data order and the dial are pure functions of seed and step, so the step is their state.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from dynaconv.artifacts.files import fsync_tree, read_json, storage_errors, write_json
from dynaconv.artifacts.tensors import read_tensors
from dynaconv.artifacts.writer import write_tensors
from dynaconv.train.engine import Engine

PREFIX = "state-"


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: Steps done.
        drift: State of the share controller.
        seconds: Training time so far.
    """

    step: int = 0
    drift: float = 0.0
    seconds: float = 0.0


def save_state(work: Path, engine: Engine, position: Position) -> None:
    """Writes the state after ``position.step`` steps into ``work``, then removes older ones."""
    folder = work / f"{PREFIX}{position.step:08d}"
    partial = work / f".{folder.name}"
    with storage_errors(work):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tensors = engine.state() | {"random/cpu": torch.get_rng_state()}
        if engine.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(engine.device)
        write_tensors(partial / "state.safetensors", {name: t.cpu().contiguous() for name, t in tensors.items()})
        write_json(partial / "state.json", vars(position))
        fsync_tree(partial)
        partial.rename(folder)
    for old in work.glob(f"{PREFIX}*"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


def load_state(work: Path, engine: Engine) -> Position:
    """Restores the newest state in ``work``; the beginning where there is none."""
    folders = sorted(work.glob(f"{PREFIX}*"))
    if not folders:
        return Position()
    tensors = read_tensors(folders[-1] / "state.safetensors")
    torch.set_rng_state(tensors.pop("random/cpu"))
    if "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors.pop("random/cuda"), engine.device)
    engine.load_state(tensors)
    return Position(**read_json(folders[-1] / "state.json"))
