"""Keeps the terminal ours: what libraries print when they are imported or load weights is silenced.

Called before any of them is imported; environment variables that the user has set are left alone.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

SETTINGS = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "WANDB_SILENT": "true",
}
ACCELERATOR_DEVICES = ("nvidia[0-9]*", "kfd", "dxg")


def silence_libraries() -> None:
    """Sets what silences transformers, datasets, deepspeed and wandb, here and in child processes."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if sys.platform == "linux" and not any(True for name in ACCELERATOR_DEVICES for _ in Path("/dev").glob(name)):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed warns that it found nothing better
    transformers = sys.modules.get("transformers")
    if transformers is not None:  # imported before us, it has read its settings already
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    if not sys.warnoptions:
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        warnings.simplefilter("ignore")
