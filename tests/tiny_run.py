"""A whole run on a tiny checkpoint in a few seconds."""

from __future__ import annotations

from pathlib import Path

from dynaconv.artifacts.files import sha256
from dynaconv.artifacts.run import Run
from dynaconv.config import CalibrateConfig, DataConfig, ExportConfig, FinetuneConfig, ProfileConfig, RunConfig
from dynaconv.pipeline.runner import Outcome, run_pipeline
from dynaconv.progress import Progress


def tiny_config(source: Path, text: Path, *, router: str = "auto", check: bool = False) -> RunConfig:
    """All five stages, about a dozen training steps, of nested experts."""
    return RunConfig(
        source=str(source),
        stages=["profile", "carve", "finetune", "calibrate", "export"],
        experts="nested",
        blocks=4,
        data=DataConfig(train=[str(text)], sequence_length=32, validation_share=0.5),
        profile=ProfileConfig(tokens=1024, batch_size=8),
        finetune=FinetuneConfig(
            tokens=12 * 4 * 32,
            batch_size=4,
            router=router,
            router_rank=8,
            budgets=[0.2, 0.75],
            warmup_steps=2,
            save_every=2,
            wandb="off",
        ),
        calibrate=CalibrateConfig(
            budgets=[0.25, 0.5, 0.75], tokens=512, score_tokens=512, batch_size=8, speed_tokens=2
        ),
        export=ExportConfig(check=check),
    )


def convert(config: RunConfig, path: Path, until: str | None = None) -> list[Outcome]:
    """Runs ``config`` in ``path``, from wherever it stands."""
    return run_pipeline(config, Run.create(path), until=until, progress=Progress(quiet=True))


def tensor_hashes(run: Path) -> dict[str, str]:
    """SHA-256 of every published tensor file of a run."""
    return {str(path.relative_to(run)): sha256(path) for path in sorted(run.glob("[0-9]*/*.safetensors"))}


def documents_file(folder: Path, source: Path, count: int = 40) -> Path:
    """``source`` cut into ``count`` documents, so that some can be held out."""
    text = source.read_text(encoding="utf-8")
    size = len(text) // count
    parts = [text[i * size : (i + 1) * size] for i in range(count)]
    path = folder / "documents.txt"
    path.write_text("<|endoftext|>".join(parts), encoding="utf-8")
    return path
