"""Where training metrics go: always a local JSON-lines file, and wandb as the recipe says."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Tracker:
    """Metrics of one run, a line a step.

    Args:
        path: JSON-lines file; lines after ``step`` (of a run that was killed past its last saved state) are dropped.
        mode: ``auto``, ``offline`` or ``off``.
        folder: Where wandb keeps its files.
        config: Shown beside the curves in wandb.
        step: Steps already done.
        log: Told once which wandb mode was taken.
    """

    def __init__(
        self, path: Path, *, mode: str, folder: Path, config: Mapping[str, Any], step: int, log: logging.Logger
    ) -> None:
        lines = "".join(json.dumps(line) + "\n" for line in recorded(path)[:step])
        path.write_text(lines, encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._wandb = None
        if mode == "off":
            return
        import wandb

        online = mode == "auto" and _has_key()
        log.info("wandb %s, files in %s", "online" if online else "offline", folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(silent=True, console="off", disable_git=True)
        self._wandb = wandb.init(
            project="dynaconv",
            mode="online" if online else "offline",
            dir=str(folder),
            config=dict(config),
            settings=settings,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of ``step``."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def close(self) -> None:
        """Flushes and ends."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def recorded(path: Path) -> list[dict[str, float]]:
    """Metrics of every step in the JSON-lines file ``path``, without a last line that a killed run left unfinished."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def _has_key() -> bool:
    if os.environ.get("WANDB_MODE", "online") != "online":
        return False
    import wandb

    return bool(wandb.login(prompt=False))  # looks into the environment and netrc, asks nobody
