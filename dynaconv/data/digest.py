"""Identity of the text a stage reads: the same text anywhere gives the same digest. No torch, no tokenizer."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from dynaconv.config import DataConfig
from dynaconv.data.sources import files
from dynaconv.errors import DataError


def digest(config: DataConfig) -> str:
    """Hex sha256 over the content of all local text and over every setting that changes documents or their split.

    Where a folder lies does not matter; names within it do, as they decide the order. A dataset on the hub counts by
    its name, configuration and split alone: what is behind the name is not seen.

    Raises:
        DataError: A spec matches nothing, or a file cannot be read.
    """
    sides = {
        "train": _content(config.train, config, config.dataset_split),
        "validation": None if config.validation is None else _content(config.validation, config, "validation"),
    }
    settings: dict[str, object] = {"field": config.field, "validation_share": config.validation_share}
    if config.chat is not None:
        settings["chat"] = config.chat
    record = json.dumps({**sides, **settings}, sort_keys=True)
    return hashlib.sha256(record.encode()).hexdigest()


def _content(specs: list[str], config: DataConfig, split: str) -> list[object]:
    listed: list[object] = []
    for spec in specs:
        found = files(spec, config.exclude)
        if found is None:
            listed.append([spec, config.dataset_config, split])
            continue
        for name, path in found:
            try:
                status = path.stat()
                listed.append([name, status.st_size, _sha256(path, status.st_size, status.st_mtime_ns)])
            except OSError as error:
                raise DataError("cannot read a text file", where=path, found=error.strerror) from error
    return listed


@functools.lru_cache(maxsize=65536)  # one command asks for the digest once per stage
def _sha256(path: Path, size: int, modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
