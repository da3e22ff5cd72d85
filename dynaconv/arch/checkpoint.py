"""A dense checkpoint folder, opened and checked against its architecture before any weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaconv.arch.check import mismatches
from dynaconv.arch.registry import family_for
from dynaconv.arch.spec import Family, Slot
from dynaconv.artifacts.files import require_space, storage_errors
from dynaconv.artifacts.tensors import CheckpointReader, TensorInfo
from dynaconv.errors import CheckpointError

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "config.json"
SIDE_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


@dataclass(frozen=True)
class Checkpoint:
    """A dense checkpoint whose tensors are known to be those of its family. Make one with :meth:`open`.

    Attributes:
        folder: Where it is.
        config: Content of its ``config.json``.
        family: Its architecture.
        reader: Its tensors.
    """

    folder: Path
    config: Mapping[str, Any]
    family: Family
    reader: CheckpointReader

    @classmethod
    def open(cls, folder: str | Path | Checkpoint) -> Checkpoint:
        """Reads ``config.json`` and the headers of the shards, and checks all names, shapes and dtypes.

        What is open already is returned as it is.

        Raises:
            UnknownArchitectureError: No family has its ``model_type``.
            CheckpointError: The folder, its config or its weights are missing or damaged, the weights are quantised,
                or tensors differ from what the config says (all differences are listed).
        """
        if isinstance(folder, Checkpoint):
            return folder
        folder = Path(folder)
        config = read_config(folder)
        family = family_for(config)
        _refuse_quantised(config, folder)
        slots = family.slots(config)
        reader = CheckpointReader(folder)
        reader.tensors = _full_names(family, slots, reader.tensors)
        problems = mismatches(family, slots, reader.tensors, tied=family.tied(config))
        if problems:
            listed = "\n".join(f"  - {problem}" for problem in problems)
            raise CheckpointError(
                f"the weights are not those of the {family.model_type} model that config.json describes\n{listed}",
                where=folder,
                hint="check that config.json and the weights come from the same model",
            )
        return cls(folder, config, family, reader)

    def imagined(self, config: Mapping[str, Any]) -> Checkpoint:
        """A checkpoint of this family with another ``config`` that nobody has written: for estimates.

        Its tensors have the dtypes of this one's; they cannot be read.

        Raises:
            CheckpointError: ``config`` lacks sizes, or they do not fit each other.
        """
        dtypes = {slot.spec.name: self.reader.tensors[name].dtype for name, slot in self.slots.items()}
        tensors = {}
        for name, slot in self.family.slots(config).items():
            dtype = dtypes.get(slot.spec.name, self.dtype)
            size = prod(slot.shape) * dtype.itemsize
            tensors[name] = TensorInfo(name, dtype, slot.shape, self.folder, 0, size)
        return Checkpoint(self.folder, config, self.family, CheckpointReader.imagined(self.folder, tensors))

    @cached_property
    def slots(self) -> dict[str, Slot]:
        """Every tensor by name, in the order of the files, with its layer and axes. Tied copies are left out."""
        slots = self.family.slots(self.config)
        return {name: slots[name] for name in self.reader.tensors if name in slots}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Length of every axis of its family; see :data:`dynaconv.arch.spec.AXES`."""
        return self.family.sizes_of(self.config)

    @property
    def layers(self) -> int:
        """Number of decoder layers, L."""
        return self.family.layer_count(self.config)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.family.tied(self.config)

    @property
    def max_positions(self) -> int | None:
        """Longest sequence in tokens, ``None`` where the config does not say."""
        value = self.config.get(self.family.positions)
        return value if isinstance(value, int) else None

    @property
    def activation(self) -> str:
        """Name of the FFN's activation, as in the config."""
        return str(self.family.setting(self.config, self.family.ffn.activation))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the FFN weights; norms may be wider."""
        ffn = self.family.ffn
        return self.reader.tensors[f"{ffn.path.format(layer=0)}.{ffn.down}.weight"].dtype

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors, tied ones counted once."""
        return sum(prod(slot.shape) for slot in self.slots.values())

    @property
    def ffn_parameters(self) -> int:
        """Elements of one layer's FFN, biases included."""
        return self.count("ffn", layer=0)

    @property
    def attention_parameters(self) -> int:
        """Elements of one layer's attention, biases included."""
        return self.count("attention", layer=0)

    @property
    def embedding_parameters(self) -> int:
        """Elements of the embedding."""
        return self.count("embedding")

    @property
    def head_parameters(self) -> int:
        """Elements that the output head multiplies with: its own, or the embedding's where they are tied."""
        return self.embedding_parameters if self.tied else self.count("head")

    def count(self, part: str, *, layer: int | None = None) -> int:
        """Elements of the tensors of ``part`` (see :data:`dynaconv.arch.spec.PARTS`), in ``layer`` or in all."""
        chosen = (s for s in self.slots.values() if s.spec.part == part and layer in (None, s.layer))
        return sum(prod(slot.shape) for slot in chosen)

    def names_of_layer(self, layer: int | None) -> list[str]:
        """Tensors of decoder layer ``layer``; of everything outside the layers for ``None``."""
        return [name for name, slot in self.slots.items() if slot.layer == layer]


def _full_names(family: Family, slots: Mapping[str, Slot], stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Tensors by the names that models have now; old checkpoints of some families lack the first part."""
    short = [name for name in stored if name not in slots and f"{family.prefix}{name}" in slots]
    if not family.prefix or not short:
        return dict(stored)
    full = {name: name if name in slots or name in family.ties else f"{family.prefix}{name}" for name in stored}
    return {full[name]: replace(info, name=full[name]) for name, info in stored.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """Content of ``folder``'s ``config.json``.

    Raises:
        CheckpointError: The folder or the file is missing, or the file is not a JSON object.
    """
    if not folder.is_dir():
        found = "a file" if folder.is_file() else "nothing"
        hint = "give the folder of a checkpoint, or the name of one on the Hugging Face hub"
        raise CheckpointError("no checkpoint folder here", where=folder, expected="a folder", found=found, hint=hint)
    path = folder / CONFIG_FILE
    if not path.is_file():
        listed = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "an empty folder"
        raise CheckpointError("the folder has no config.json", where=folder, found=listed)
    try:
        with storage_errors(path):
            config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError("config.json is not valid JSON", where=path, found=error) from error
    if not isinstance(config, dict):
        raise CheckpointError("config.json is not a JSON object", where=path, found=type(config).__name__)
    return config


def _refuse_quantised(config: Mapping[str, Any], folder: Path) -> None:
    quantisation = config.get("quantization_config") or config.get("compression_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise CheckpointError(
            "the checkpoint is quantised: neurons cannot be reordered within packed weights",
            where=folder,
            expected="fp32, fp16 or bf16 weights",
            found=method or "quantization_config in config.json",
            hint="convert the full-precision checkpoint and quantise the result",
        )


def side_files(folder: Path) -> list[Path]:
    """Files that belong to a model and are not its weights or its config: tokenizer, templates, licence."""
    return sorted({path for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file()})


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copies the side files of ``source`` into ``target`` and returns their names.

    Raises:
        ArtifactError: The disk is full, read-only or not accessible.
    """
    copied = side_files(source)
    needed = sum(path.stat().st_size for path in copied)
    with storage_errors(target, needed=needed):
        require_space(target, needed)
        for path in copied:
            shutil.copyfile(path, target / path.name)
    return [path.name for path in copied]
