"""The dense checkpoint a run starts from: where it is, and what it is (a hash over every file that matters)."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from dynaconv.artifacts.files import sha256, storage_errors
from dynaconv.errors import CheckpointError

# What defines a checkpoint: weights, configs and tokenizer. Read-me files and pickles are left behind.
FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "tokenizer*", "vocab*", "merges*")
LEFT_OUT = ("consolidated*", "*/*")
USER_STATE = ("dial.json",)  # a choice that users change later; it is no part of what was made
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve(source: str) -> Path:
    """Absolute folder of the checkpoint ``source``: a local folder, or a hub name, which is downloaded or cached.

    Raises:
        CheckpointError: No such folder; not on the hub; not allowed; or the hub cannot be reached.
    """
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        return folder.resolve()
    if folder.is_file():
        raise CheckpointError("the source is a file", where=folder, expected="a checkpoint folder or a hub name")
    if not HUB_NAME.fullmatch(source):
        raise CheckpointError("no such folder", where=source or "(empty)", expected="a checkpoint folder or a hub name")
    return _download(source)


def _download(name: str) -> Path:
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    where = f"{name} (no such folder here, so taken for a hub name)"
    try:
        with storage_errors(Path(name)):
            folder = Path(snapshot_download(name, allow_patterns=list(FILES), ignore_patterns=list(LEFT_OUT)))
    except GatedRepoError as error:
        hint = f"accept the licence at https://huggingface.co/{name}, then `hf auth login`"
        raise CheckpointError("the hub wants you to accept a licence first", where=where, hint=hint) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        hint = "check the spelling; for a private model, `hf auth login`"
        raise CheckpointError("no such folder and no such model on the hub", where=where, hint=hint) from error
    except (OSError, HTTPError) as error:
        found = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "check the path; or connect to the network (and unset HF_HUB_OFFLINE); or download it elsewhere"
        what = "no such folder, and the hub cannot be reached"
        raise CheckpointError(what, where=where, found=found, hint=hint) from error
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            "the model on the hub has no safetensors weights",
            where=f"https://huggingface.co/{name}",
            hint="pickle files can run code and are not read; convert them with transformers' save_pretrained",
        )
    return folder


def digest(folder: Path) -> str:
    """Hex SHA-256 over names, sizes and contents of the files that matter in ``folder``; other files may change.

    Raises:
        CheckpointError: ``folder`` is no folder.
        ArtifactError: A file cannot be read.
    """
    if not folder.is_dir():
        raise CheckpointError("no checkpoint folder here", where=folder)
    every = {path for pattern in FILES for path in folder.glob(pattern) if path.is_file()}
    paths = every.difference(*(folder.glob(pattern) for pattern in LEFT_OUT))
    hasher = hashlib.sha256()
    for path in sorted(paths):
        if path.name not in USER_STATE:
            hasher.update(f"{path.name}\0{path.stat().st_size}\0{sha256(path)}\n".encode())
    return hasher.hexdigest()


def shown_name(source: str) -> str:
    """What people call ``source``: a hub name, or the last part of a folder's path."""
    return Path(source).name if Path(source).exists() else source
