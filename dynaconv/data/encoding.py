"""Documents to tokens, here or in worker processes; the tokens and their order are the same either way."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dynaconv.data import conversation
from dynaconv.data.readers import Document
from dynaconv.errors import DataError

ALONE = 64  # batches before workers are started: they cost seconds to start, and most runs need less text
MOST_WORKERS = 8  # one process reads for all of them, and each holds a few hundred MB of libraries
Label = TypeVar("Label")


@dataclass(frozen=True)
class Encoded:
    """Tokens of some documents.

    Attributes:
        tokens: (S,) int32, one document behind the other.
        lengths: Tokens of each document.
        scored: (S,) bool, which tokens are to be predicted; ``None`` where all are.
        documents: How many were read for them: a conversation may give several samples.
        unanswered: Conversations among them that gave none, as the assistant says nothing in them.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]
    scored: NDArray[np.bool_] | None
    documents: int
    unanswered: int = 0


@dataclass(frozen=True)
class Encoder:
    """Tokenises documents, and conversations through the chat template.

    Attributes:
        tokenizer: A transformers tokenizer.
        longest: Tokens a document is cut to; ``None`` keeps it whole.
        chat: There may be conversations, so say which tokens are scored.
        vocabulary: Rows of the model's embedding, if known.
    """

    tokenizer: Any
    longest: int | None = None
    chat: bool = False
    vocabulary: int | None = None

    def __call__(self, documents: Sequence[Document]) -> Encoded:
        """Tokens of ``documents``; those of text end in the end-of-text token.

        Raises:
            DataError: The model has no embedding for a token, or the template refuses a conversation.
        """
        texts = iter(self._texts([document.text for document in documents if not document.chat]))
        samples: list[conversation.Sample] = []
        unanswered = 0
        for document in documents:
            if document.chat:
                answered = conversation.encode(self.tokenizer, document.text, document.name)
                unanswered += not answered
                samples += answered
            else:
                ids = next(texts)
                samples.append(conversation.Sample(ids, [True] * len(ids) if self.chat else []))
        tokens = _joined([sample.ids[: self.longest] for sample in samples], np.int32)
        self._check(tokens)
        lengths = np.array([len(sample.ids[: self.longest]) for sample in samples], dtype=np.int64)
        scored = _joined([sample.scored[: self.longest] for sample in samples], np.bool_) if self.chat else None
        return Encoded(tokens, lengths, scored, len(documents), unanswered)

    def _texts(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        settings = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        encoded = self.tokenizer(texts, add_special_tokens=False, **settings)["input_ids"]
        end = end_of_text(self.tokenizer)
        return [[*ids, *end] for ids in encoded]

    def _check(self, tokens: NDArray[np.int32]) -> None:
        largest = int(tokens.max()) if len(tokens) else 0
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise DataError(
                "the tokenizer is not this model's",
                expected=f"token ids below {self.vocabulary}, the rows of the embedding",
                found=f"token id {largest}",
                hint="keep the tokenizer files that came with the checkpoint",
            )


def end_of_text(tokenizer: Any) -> list[int]:
    """The token that ends a document; none where the tokenizer has no end of text."""
    for name in ("eos_token_id", "bos_token_id", "sep_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return [int(found)]
    return []


def encode_in_order(
    encoder: Encoder, batches: Iterator[tuple[Label, list[Document]]], workers: int | None = None
) -> Generator[tuple[Label, Encoded], None, None]:
    """Each batch's label and tokens, in order. Close the iterator when enough has been read of it.

    Args:
        encoder: Turns a batch into tokens; one that cannot be pickled stays in this process.
        batches: With workers, read ahead of what is returned by one batch for each; without, never ahead.
        workers: Processes; the first batches are encoded here, so that little text starts none. ``None`` takes the
            cores this process may use, 1 stays in this process.

    Raises:
        DataError: As :class:`Encoder`; a worker was killed.
    """
    workers = min(MOST_WORKERS, _cores()) if workers is None else workers
    for label, documents in itertools.islice(batches, ALONE if workers > 1 else None):
        yield label, encoder(documents)
    more = next(batches, None)
    if more is None:
        return
    batches = itertools.chain([more], batches)
    try:
        pickled = pickle.dumps(encoder)
    except (pickle.PicklingError, TypeError, AttributeError):
        yield from ((label, encoder(documents)) for label, documents in batches)
        return
    with ExitStack() as stack:
        processes = [stack.enter_context(Worker(pickled)) for _ in range(workers)]
        waiting: deque[tuple[Label, Worker]] = deque()
        for label, documents in batches:
            if len(waiting) < workers:
                worker = processes[len(waiting)]
            else:
                done, worker = waiting.popleft()
                yield done, worker.result()
            worker.send(documents)
            waiting.append((label, worker))
        for label, worker in waiting:
            yield label, worker.result()


class Worker:
    """A process of its own that runs an encoder. It ends when this one does, however that comes about.

    It is not one of ``multiprocessing``, which would run a user's script once more in every process.

    Args:
        encoder: A pickled :class:`Encoder`.
    """

    def __init__(self, encoder: bytes) -> None:
        path = os.pathsep.join(part for part in sys.path if part)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dynaconv.data.worker"],  # -P: the current folder is no place for modules
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},  # it is the parallelism
            process_group=0,  # so that Ctrl-C is ours alone to hear
        )
        self._write(encoder)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        with suppress(BrokenPipeError), self.process:  # waits, and closes the pipes
            pass

    def send(self, documents: Sequence[Document]) -> None:
        """Gives it a batch; it must have none."""
        self._write(pickle.dumps(documents))

    def result(self) -> Encoded:
        """Waits for what it made of the batch it was given.

        Raises:
            DataError: The batch is bad, or the process was killed.
        """
        assert self.process.stdout is not None
        try:
            answer = pickle.load(self.process.stdout)
        except (EOFError, pickle.UnpicklingError) as error:
            raise self._killed() from error
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Encoded)
        return answer

    def _write(self, content: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(content)
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise self._killed() from error

    def _killed(self) -> DataError:
        return DataError(
            "a process that tokenises text was killed",
            found=f"exit status {self.process.wait()}",
            hint="look for a lack of memory; run the same command again: what is on disk is kept",
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _joined(parts: Sequence[Sequence[Any]], dtype: Any) -> NDArray[Any]:
    return np.fromiter(itertools.chain.from_iterable(parts), dtype, count=sum(map(len, parts)))
