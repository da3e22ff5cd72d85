"""Documents of a Hugging Face dataset, streamed: nothing is downloaded beyond what is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dynaconv.config import DataConfig
from dynaconv.data.readers import Document, text_of
from dynaconv.errors import DataError

SHUFFLE = 1000  # rows held back while streaming, so that a prefix is not one corner of the first shard
SECONDS_TO_ANSWER = 20


def documents(name: str, config: DataConfig, split: str) -> Iterator[Document]:
    """Streams ``NAME`` or ``NAME:SPLIT``.

    Args:
        name: Name on the hub, optionally with the split behind a colon.
        config: Says the dataset's configuration and the field of the text or conversation.
        split: Used when ``name`` says none.

    Raises:
        DataError: Unknown, offline, or without such a configuration, split or field.
    """
    name, _, named_split = name.partition(":")
    split = named_split or split
    where = f"dataset {name}, split {split}"
    try:
        import datasets
        import huggingface_hub

        huggingface_hub.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        datasets.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        if not Path(name).exists():  # one question first: load_dataset retries for most of a minute when offline
            huggingface_hub.dataset_info(name, timeout=SECONDS_TO_ANSWER)
        rows = datasets.load_dataset(name, config.dataset_config, split=split, streaming=True)
        for index, row in enumerate(rows.shuffle(seed=0, buffer_size=SHUFFLE)):
            text = text_of(row, config.field, config.chat, where)
            if text.strip():
                yield Document(f"{name}#{index}", text, config.chat is not None)
    except DataError:
        raise
    except Exception as error:  # the library and what it calls raise dozens of kinds
        first = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"no file or folder {name!r} here, and the dataset of that name cannot be read",
            where=where,
            found=f"{type(error).__name__}: {first}",
            hint="check the path or the name, the network, data.dataset_config and data.dataset_split; "
            "or use text that is here: data=FILE, data=FOLDER, data=python-stdlib",
        ) from error
