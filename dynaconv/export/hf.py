"""Target ``hf``: a Hugging Face folder that stock transformers loads as the dense model, with the dial beside it.

Holds every nested model exactly: the plain tensors are the parent's, named and shaped as in the parent.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynaconv.arch.checkpoint import CONFIG_FILE, copy_side_files, read_config
from dynaconv.artifacts.files import atomic_write, require_space, storage_errors, write_json
from dynaconv.dynamic.layout import ROUTER_FILE, Layout
from dynaconv.export.bundle import ENTRY_CLASS, ENTRY_FILE, write_bundle
from dynaconv.export.card import model_card
from dynaconv.export.check import check
from dynaconv.frontier import FRONTIER_FILE, PICTURE_FILE
from dynaconv.version import __version__

CARD_FILE = "README.md"

__all__ = ["check", "write"]


def write(
    dynamic: Path, dials: Path, folder: Path, *, parent: str, lineage: Mapping[str, Any], training: Mapping[str, Any]
) -> None:
    """Writes the folder.

    Args:
        dynamic: The converted checkpoint.
        dials: What calibration made of it.
        folder: Empty folder to fill.
        parent: Name of the dense checkpoint, for the card.
        lineage: Where the model came from, kept in ``dynaconv.json``.
        training: Resolved ``finetune`` section where the model was tuned, else empty.

    Raises:
        ArtifactError: The disk is full or cannot be written.
    """
    config = read_config(dynamic)
    weights = [path for path in sorted(dynamic.glob("*.safetensors*")) if path.name != ROUTER_FILE]
    routers = [place / ROUTER_FILE for place in (dials, dynamic)]  # calibration measures what routers carry along
    weights += [path for path in routers if path.is_file()][:1]
    require_space(folder, sum(path.stat().st_size for path in weights))
    with storage_errors(folder):
        for path in [*weights, dials / FRONTIER_FILE, dials / PICTURE_FILE]:
            shutil.copyfile(path, folder / path.name)
        write_bundle(folder, config["model_type"])
    copy_side_files(dynamic, folder)
    layout = replace(Layout.load(dials), lineage=dict(lineage))
    layout.save(folder)
    config["auto_map"] = {"AutoModelForCausalLM": f"{ENTRY_FILE}.{ENTRY_CLASS}"}
    config["dynaconv"] = {"version": __version__, "blocks": layout.blocks, "router": layout.router.kind}
    write_json(folder / CONFIG_FILE, config)
    atomic_write(folder / CARD_FILE, model_card(layout, parent, training))
