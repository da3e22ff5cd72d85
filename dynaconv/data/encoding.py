"""Documents to tokens, here or in worker processes; the tokens and their order are the same either way."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dynaconv.data import conversation
from dynaconv.data.readers import Document
from dynaconv.errors import DataError

ALONE = 16  # batches before workers are started: they cost seconds to start, and most runs need less text
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
        encoder: Turns a batch into tokens.
        batches: Read a few batches ahead of what is returned where there are workers, never ahead without.
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
    spawn = multiprocessing.get_context("spawn")  # a fork would copy locks that threads of ours hold
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_begin, initargs=(encoder,))
    try:
        waiting: deque[tuple[Label, Future[Encoded]]] = deque()
        for label, documents in itertools.chain([more], batches):
            waiting.append((label, pool.submit(_encode, documents)))
            if len(waiting) >= 2 * workers:
                label, encoded = waiting.popleft()
                yield label, encoded.result()
        for label, encoded in waiting:
            yield label, encoded.result()
    except BrokenProcessPool as error:
        hint = "look for a lack of memory; run the same command again: what is on disk is kept"
        raise DataError("a process that tokenises text was killed", hint=hint) from error
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder  # of a worker process


def _begin(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too and ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # this process is the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(documents: list[Document]) -> Encoded:
    return _encoder(documents)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _joined(parts: Sequence[Sequence[Any]], dtype: Any) -> NDArray[Any]:
    return np.fromiter(itertools.chain.from_iterable(parts), dtype, count=sum(map(len, parts)))
