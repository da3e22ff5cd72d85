"""Rows of ``bench_resize.py``: one training run each, kept in a file of its own, so that no run is made twice."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import typer

from dynaconv.artifacts.files import read_json, write_json
from dynaconv.data.windows import Batch, Windows, training_batch
from dynaconv.evaluation.scoring import score
from dynaconv.train.pretrain import Schedule, rate

MARKS = (0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1)  # shares of the budget at which a run is scored
BETAS = (0.9, 0.95)
Result = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """What one training run depends on, besides what all runs share.

    Attributes:
        start: ``random``, ``subclone``, ``hyperclone``, or ``base`` (the small model that is hypercloned).
        variant: How the clone was made, where not by default.
        learning_rate: Peak.
        seed: Seeds random weights, noise and data order.
        tokens: Budget; the learning rate has fallen to zero at its end.
        optimizer: ``AdamW``, or ``Muon``: Muon for the layers' matrices and AdamW for the rest.
        source: Name of the checkpoint that was cloned.
    """

    start: str
    variant: str
    learning_rate: float
    seed: int
    tokens: int
    optimizer: str = "AdamW"
    source: str = ""

    @property
    def name(self) -> str:
        """Name of its file."""
        what = (
            self.start,
            self.variant.replace(" ", "-"),
            self.optimizer,
            f"{self.learning_rate:g}",
            self.seed,
            self.tokens,
        )
        return "-".join(str(each) for each in (*what, self.source and f"from-{self.source}") if each != "")


@dataclass(frozen=True)
class Bench:
    """What all rows share, and the rows so far.

    Attributes:
        folder: Where rows are kept.
        windows: Training text.
        held_out: Batches that are scored.
        schedule: Batch size, warm-up, decay, weight decay, clip and precision.
        rows: Finished rows, in the order they were first asked for.
    """

    folder: Path
    windows: Windows
    held_out: Sequence[Batch]
    schedule: Schedule
    rows: list[Result] = field(default_factory=list)

    @property
    def shared(self) -> dict[str, Any]:
        """Settings that no row has of its own."""
        names = ("batch_size", "warmup_share", "decay_share", "weight_decay", "clip", "precision")
        shared = {name: getattr(self.schedule, name) for name in names}
        shared |= {"sequence_length": self.windows.length, "text_tokens": self.windows.total_tokens}
        return shared | {"betas": list(BETAS)}

    def run(
        self,
        row: Row,
        make: Callable[[Row], Any],
        measure: Callable[[Any], dict[str, float]] | None = None,
        keep: Path | None = None,
    ) -> Result:
        """Trains the model that ``make`` gives, or finds the row.

        Args:
            row: What is run.
            make: Gives the model to train.
            measure: Taken of the model before and after.
            keep: Folder in which the trained model is saved.
        """
        path = self.folder / "rows" / f"{row.name}.json"
        found: Result | None = read_json(path) if path.is_file() else None
        if found is None or found["shared"] != self.shared or (keep is not None and not keep.is_dir()):
            found = self._trained(row, make, measure or (lambda model: {}), keep)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, found)
            start, end = found["curve"][0][1], found["curve"][-1][1]
            typer.echo(f"{row.name}: loss {start:.4f} -> {end:.4f} in {found['seconds']:.0f} s")
        listed = {name: value for name, value in found.items() if name != "shared"}
        self.rows.extend([listed] if listed not in self.rows else [])
        return found

    def tuned(
        self,
        row: Row,
        rates: Sequence[float],
        seeds: int,
        make: Callable[[Row], Any],
        measure: Callable[[Any], dict[str, float]] | None = None,
    ) -> list[Result]:
        """``row`` at its best learning rate, judged on seed 0, for every seed.

        While the best of ``rates`` is the lowest or the highest, half or twice of it is tried as well.
        """
        found = {lr: self.run(replace(row, learning_rate=lr, seed=0), make, measure) for lr in rates}
        while True:
            best = min(found, key=lambda lr: end_loss(found[lr]))
            further = {min(found): best / 2, max(found): best * 2}.get(best)
            if further is None:
                break
            found[further] = self.run(replace(row, learning_rate=further, seed=0), make, measure)
        rest = (replace(row, learning_rate=best, seed=seed) for seed in range(1, seeds))
        return [found[best], *(self.run(each, make, measure) for each in rest)]

    def _trained(
        self, row: Row, make: Callable[[Row], Any], measure: Callable[[Any], dict[str, float]], keep: Path | None
    ) -> Result:
        model, began = make(row), time.monotonic()
        result = asdict(row) | {"shared": self.shared, "before": measure(model), "curve": self._curve(model, row)}
        if keep is not None:
            model.save_pretrained(keep)
        return result | {"after": measure(model), "seconds": round(time.monotonic() - began, 1)}

    def _curve(self, model: Any, row: Row) -> list[list[float]]:
        """Trains ``model`` in place; [tokens, held-out loss] at every mark."""
        schedule, curve = self.schedule, []
        tokens_per_step = schedule.batch_size * self.windows.length
        steps = max(1, row.tokens // tokens_per_step)
        due = {round(steps * share) for share in MARKS}
        optimizers = optimizers_of(model, row.optimizer, schedule.weight_decay)
        model.train()
        for step in range(steps + 1):
            if step in due:
                curve.append([step * tokens_per_step, self._held_out_loss(model)])
            if step == steps:
                break
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = row.learning_rate * rate(step, steps, schedule)
            batch = training_batch(self.windows, step, schedule.batch_size, row.seed)
            with self._precision():
                logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].float()
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.input_ids[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return curve

    def _held_out_loss(self, model: Any) -> float:
        with self._precision():
            return score(model, self.held_out).loss

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        bf16 = self.schedule.precision == "bf16"
        return torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()


def optimizers_of(model: Any, kind: str, weight_decay: float) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or for what Muon leaves: embeddings and norms. Norms are not decayed.

    Muon's updates are scaled to AdamW's usual size, so that one learning rate serves both.
    """
    named = list(model.named_parameters())
    matrices = [p for name, p in named if kind == "Muon" and ".layers." in name and p.dim() == 2]
    taken = {id(p) for p in matrices}
    others = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in others if p.dim() == 2], "weight_decay": weight_decay},
        {"params": [p for p in others if p.dim() != 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=BETAS, fused=True)
    if not matrices:
        return [adamw]
    return [torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"), adamw]


def end_loss(result: Result) -> float:
    """Held-out loss, nats a token, at the end of the budget."""
    return float(result["curve"][-1][1])


def tokens_to_reach(result: Result, loss: float) -> float | None:
    """Tokens after which a curve is first at or below ``loss``, straight between marks; ``None`` where it never is."""
    curve = result["curve"]
    if curve[0][1] <= loss:
        return float(curve[0][0])
    for (tokens, high), (later, low) in pairwise(curve):
        if low <= loss:
            return float(tokens + (later - tokens) * (high - loss) / (high - low))
    return None
