"""Text and weights that everything in the quality benchmark shares: what is fitted on, what is scored, which bits."""

from __future__ import annotations

import random
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dynaconv.arch.checkpoint import Checkpoint, copy_side_files
from dynaconv.arch.stock import load_dense
from dynaconv.data.windows import Batch

PACKAGE_CHARACTERS = 60_000  # of each package, at most
WINDOWS, LENGTH, BATCH = 160, 256, 16


def training_text(path: Path, exclude: list[str], characters: int = PACKAGE_CHARACTERS) -> Path:
    """Python source of the standard library and of installed packages, at most ``characters`` of each; made once."""
    if path.is_file():
        return path
    paths = sysconfig.get_paths()
    skipped = {*exclude, "site-packages", "encodings", "pydoc_data", "lib2to3"}
    packages: dict[str, list[Path]] = {}
    for root in (Path(paths["purelib"]), Path(paths["stdlib"])):
        for file in sorted(root.rglob("*.py")):
            parts = file.relative_to(root).parts
            if not skipped & set(parts):
                packages.setdefault(f"{root.name}/{parts[0] if len(parts) > 1 else ''}", []).append(file)
    documents = []
    for files in packages.values():
        random.Random(0).shuffle(files)
        left = characters
        for file in files:
            source = file.read_text(encoding="utf-8", errors="ignore")[:left]
            documents += [source] if source.strip() else []
            left -= len(source)
            if left <= 0:
                break
    random.Random(0).shuffle(documents)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("<|endoftext|>".join(documents), encoding="utf-8")
    return path


def windows(tokenizer: Any, path: Path, count: int = WINDOWS, length: int = LENGTH, seed: int = 7) -> Iterator[Batch]:
    """``count`` windows of ``length`` tokens at random places of the text at ``path``, batch after batch of 16."""
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    tokens, generator = torch.tensor(ids), torch.Generator().manual_seed(seed)
    for start in range(0, count, BATCH):
        starts = torch.randint(0, len(tokens) - length - 1, (min(BATCH, count - start),), generator=generator)
        yield Batch(torch.stack([tokens[i : i + length] for i in starts]))


def half_precision(model: Path, folder: Path, dtype: torch.dtype) -> Path:
    """The checkpoint ``model`` in ``dtype``: itself where it has it, or else a copy in ``folder``, made once."""
    if Checkpoint.open(model).dtype == dtype:
        return model
    if not folder.is_dir():
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        load_dense(model, torch.device("cpu")).to(dtype).save_pretrained(partial)
        copy_side_files(model, partial)
        partial.rename(folder)
    return folder
