"""Where tokens are gathered: in memory, or in files that are mapped when read and go on where they were interrupted.

On disk one name is ``NAME.tokens`` (uint16 or int32, as the vocabulary needs), ``NAME.lengths`` (int64, tokens of each
document, only where documents are windows), ``NAME.scored`` (one byte a token, only with conversations) and
``NAME.json``, which says what they are of and how much of them counts: it is written after they have been flushed, and
whatever lies beyond is cut off on going on. Tokens of another text, tokenizer or setting are replaced.
"""

from __future__ import annotations

import fcntl
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from dynaconv.artifacts.files import read_json, require_space, storage_errors, write_json
from dynaconv.data.encoding import Encoded

COMMIT = 1 << 22  # tokens between flushes to the disk: what an interruption costs at most


@dataclass
class Amount:
    """How much has been stored.

    Attributes:
        tokens: Tokens.
        samples: Documents and conversations they are of.
        documents: Documents read for them.
        unanswered: Conversations among them that were left out, as the assistant says nothing in them.
        ended: There are no more.
    """

    tokens: int = 0
    samples: int = 0
    documents: int = 0
    unanswered: int = 0
    ended: bool = False


@dataclass(frozen=True)
class Stored:
    """What was stored.

    Attributes:
        tokens: (S,) int32 or uint16.
        lengths: (N,) int64, tokens of each sample.
        scored: (S,) bool, which tokens are predicted; ``None`` where all are.
    """

    tokens: Tensor
    lengths: Tensor
    scored: Tensor | None


class Store(ABC):
    """Appends tokens in order; ``amount`` says how much there is already."""

    amount: Amount

    @abstractmethod
    def append(self, encoded: Encoded) -> None:
        """Adds tokens behind those that are there."""

    @abstractmethod
    def finish(self, *, ended: bool) -> None:
        """Keeps what was appended; ``ended`` says that there is no more text."""

    @abstractmethod
    def read(self) -> Stored:
        """All that is stored."""

    def _count(self, encoded: Encoded) -> None:
        self.amount.tokens += len(encoded.tokens)
        self.amount.samples += len(encoded.lengths)
        self.amount.documents += encoded.documents
        self.amount.unanswered += encoded.unanswered


class MemoryStore(Store):
    """Tokens in memory."""

    def __init__(self) -> None:
        self.amount = Amount()
        self.parts: list[Encoded] = []

    def append(self, encoded: Encoded) -> None:
        """Adds tokens behind those that are there."""
        self.parts.append(encoded)
        self._count(encoded)

    def finish(self, *, ended: bool) -> None:
        """Nothing to do but to note whether there is more."""
        self.amount.ended = ended

    def read(self) -> Stored:
        """All that is stored, joined; what it was joined from is let go."""
        parts, self.parts = self.parts, []
        scored = [part.scored for part in parts if part.scored is not None]
        return Stored(
            torch.from_numpy(np.concatenate([np.empty(0, np.int32), *(part.tokens for part in parts)])),
            torch.from_numpy(np.concatenate([np.empty(0, np.int64), *(part.lengths for part in parts)])),
            torch.from_numpy(np.concatenate(scored)) if scored else None,
        )


class DiskStore(Store):
    """Tokens in files.

    Args:
        folder: Where they lie.
        name: Of the files, before the suffix.
        key: Identity of the text, the tokenizer and all settings that change tokens.
        small: Every token id fits into 16 bits.
        lengths: Samples are windows of their own.
        scored: Some tokens are not predicted.
    """

    def __init__(self, folder: Path, name: str, key: str, *, small: bool, lengths: bool, scored: bool) -> None:
        self.folder, self.name, self.key = folder, name, key
        kinds: dict[str, Any] = {"tokens": np.uint16 if small else np.int32}
        kinds |= {"lengths": np.int64} if lengths else {}
        kinds |= {"scored": np.bool_} if scored else {}
        self.kinds = {kind: np.dtype(dtype) for kind, dtype in kinds.items()}
        self.files: dict[str, BinaryIO] = {}
        self.amount = self._known()
        self.committed = self.amount.tokens

    @contextmanager
    def writing(self, wanted: int | None) -> Iterator[None]:
        """Holds the store for the block, waiting for another process that does; then looks again at what there is.

        Args:
            wanted: Tokens that will be there in the end, if known: refuses at once where the disk is too small.

        Raises:
            ArtifactError: The disk is full, read-only or failing.
        """
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / f"{self.name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self.amount = self._known()
                self.committed = self.amount.tokens
                if wanted is not None:
                    require_space(self.folder, (wanted - self.amount.tokens) * self.kinds["tokens"].itemsize)
                yield
            finally:
                for file in self.files.values():
                    file.close()
                self.files = {}
                os.close(lock)

    def append(self, encoded: Encoded) -> None:
        """Writes tokens behind those that are there; within :meth:`writing` only."""
        with storage_errors(self.folder):
            if not self.files:
                self._open()
            for kind, file in self.files.items():
                file.write(np.asarray(getattr(encoded, kind), self.kinds[kind]).tobytes())
            self._count(encoded)
            if self.amount.tokens - self.committed >= COMMIT:
                self._commit()

    def finish(self, *, ended: bool) -> None:
        """Flushes what was appended and records it."""
        with storage_errors(self.folder):
            if not self.files:
                self._open()
            self.amount.ended = ended
            self._commit()

    def read(self) -> Stored:
        """All that is stored, mapped: only what is looked at is read."""
        content = {kind: self._map(kind) for kind in self.kinds}
        return Stored(
            content["tokens"], content.get("lengths", torch.empty(0, dtype=torch.int64)), content.get("scored")
        )

    def _map(self, kind: str) -> Tensor:
        count = self._counts(self.amount)[kind]
        if count == 0:
            return torch.from_numpy(np.empty(0, self.kinds[kind]))
        with storage_errors(self._path(kind)):  # "c": torch wants memory it may write to; nothing reaches the file
            return torch.from_numpy(np.memmap(self._path(kind), self.kinds[kind], mode="c", shape=(count,)))

    def _open(self) -> None:
        if not self.amount.documents:
            self._path("json").unlink(missing_ok=True)  # before the files it describes change
        counts = self._counts(self.amount)
        for kind, dtype in self.kinds.items():
            self.files[kind] = self._path(kind).open("ab")
            self.files[kind].truncate(counts[kind] * dtype.itemsize)

    def _commit(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        write_json(self._path("json"), {"key": self.key, **asdict(self.amount)})
        self.committed = self.amount.tokens

    def _known(self) -> Amount:
        """What an earlier process left that is of use."""
        if not self._path("json").is_file():
            return Amount()
        record = read_json(self._path("json"))
        if record.pop("key", None) != self.key:
            return Amount()
        amount = Amount(**record)
        for kind, count in self._counts(amount).items():
            path = self._path(kind)
            if not path.is_file() or path.stat().st_size < count * self.kinds[kind].itemsize:
                return Amount()
        return amount

    def _counts(self, amount: Amount) -> dict[str, int]:
        return {kind: amount.samples if kind == "lengths" else amount.tokens for kind in self.kinds}

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.name}.{suffix}"
