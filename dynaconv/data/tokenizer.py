"""Loads a checkpoint's tokenizer, quietly, or says what is missing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dynaconv.errors import CheckpointError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json", "spiece.model")


def load_tokenizer(folder: Path | str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer saved in ``folder``, as transformers loads it; nothing is fetched.

    Raises:
        CheckpointError: The folder has no tokenizer, or one that transformers cannot load.
    """
    folder = Path(folder)
    hint = "save it beside the model: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)"
    if not any((folder / name).is_file() for name in _FILES):
        raise CheckpointError("the checkpoint has no tokenizer", where=folder, expected=_FILES[0], hint=hint)
    from transformers import AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files surface as anything from KeyError to a Rust panic's Exception
        first = (str(error).splitlines() or [""])[0]
        found = f"{type(error).__name__}: {first}"
        raise CheckpointError("the tokenizer cannot be loaded", where=folder, found=found, hint=hint) from error
    finally:
        logging.set_verbosity(verbosity)


def tokenizer_digest(tokenizer: Any) -> str:
    """Hex sha256 over what decides how ``tokenizer`` turns text and conversations into tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else [type(tokenizer).__name__, tokenizer.get_vocab()]
    special = {str(name): str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()}
    record = [rules, special, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
