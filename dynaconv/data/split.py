"""Which documents are trained on and which are held out: decided by their content, never by their place.

Identical documents fall on the same side, and the answer for one document depends on no other. Only where there are
too few documents to draw a share of them (a single text file, say) are they cut into pieces first, and the pieces with
the smallest hashes held out. Conversations are never cut.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from dynaconv.config import DataConfig
from dynaconv.data.readers import Document
from dynaconv.data.sources import documents
from dynaconv.errors import DataError

FEW = 200  # documents; with fewer, a share of 5 % held out by chance may be none
PIECE = 2048  # characters of a piece of a document, at least


class Sided(NamedTuple):
    """A document and the side it is on."""

    held_out: bool
    document: Document


class Source(NamedTuple):
    """Text that is counted together.

    Attributes:
        name: As the user named it.
        weight: Share of the training windows, of all sources 1 together; 0 for text that is only held out.
        documents: All of it, lazily and in a fixed order.
    """

    name: str
    weight: float
    documents: Iterator[Sided]


def content_hash(text: str) -> bytes:
    """Identity of a document."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def split_documents(config: DataConfig, *, skipped: list[str] | None = None) -> Iterator[Sided]:
    """All documents of ``config`` in one stream, each with its side; weights do not count. See :func:`split_sources`.

    Raises:
        DataError: See :func:`dynaconv.data.sources.documents`.
    """
    for source in split_sources(replace(config, weights=None), skipped=skipped):
        yield from source.documents


def split_sources(config: DataConfig, *, skipped: list[str] | None = None) -> list[Source]:
    """The text of ``config``, each document with its side: one source for each weight, or one for all there is.

    With ``config.validation`` that text is held out whole, as a source of its own, and documents of ``config.train``
    that also occur in it are left out. The side of a document is the same in every source.

    Args:
        config: Where the text is.
        skipped: Collects the names of files that are left out because they are not UTF-8 text.

    Raises:
        DataError: See :func:`dynaconv.data.sources.documents`.
    """
    weights = config.weights or [1.0]
    groups = [[spec] for spec in config.train] if config.weights else [config.train]
    if len(weights) != len(groups):
        raise DataError(
            "the weights do not fit the sources",
            where="data.weights",
            expected=f"{len(groups)} numbers, one for each of data.train",
            found=len(weights),
        )
    streams = [documents(group, config, skipped=skipped) for group in groups]
    split = _split_own if config.validation is not None else _split_by_content
    names, total = [",".join(group) for group in groups], sum(weights)
    sided = split(streams, config, skipped)
    sources = [Source(*source) for source in zip(names, [w / total for w in weights], sided, strict=False)]
    if config.validation is not None:
        held_out = (Sided(True, document) for document in _validation(config, skipped))
        sources.insert(0, Source(",".join(config.validation), 0.0, held_out))
    return sources


def _validation(config: DataConfig, skipped: list[str] | None) -> Iterator[Document]:
    return documents(config.validation or [], config, split="validation", skipped=skipped)


def _split_own(
    streams: Sequence[Iterator[Document]], config: DataConfig, skipped: list[str] | None
) -> list[Iterator[Sided]]:
    @functools.cache
    def held_out() -> frozenset[bytes]:  # read through when the first document to train on is
        return frozenset(content_hash(document.text) for document in _validation(config, skipped))

    def rest(stream: Iterator[Document]) -> Iterator[Sided]:
        for document in stream:
            if content_hash(document.text) not in held_out():
                yield Sided(False, document)

    return [rest(stream) for stream in streams]


def _split_by_content(
    streams: Sequence[Iterator[Document]], config: DataConfig, skipped: list[str] | None
) -> list[Iterator[Sided]]:
    share, heads, count = config.validation_share, [], 0
    for stream in streams:  # however many sources there are, what counts as few is decided once
        heads.append(list(itertools.islice(stream, FEW - count)))
        count += len(heads[-1])
    if count < FEW and share > 0:
        return _split_few(heads, share)

    def sided(stream: Iterable[Document]) -> Iterator[Sided]:
        for document in stream:
            yield Sided(_is_held_out(document.text, share), document)

    return [sided(itertools.chain(head, stream)) for head, stream in zip(heads, streams, strict=True)]


def _is_held_out(text: str, share: float) -> bool:
    return int.from_bytes(content_hash(text)[:8]) < share * 2**64


def _split_few(heads: Iterable[Iterable[Document]], share: float) -> list[Iterator[Sided]]:
    cut = [[piece for document in head for piece in _cut(document)] for head in heads]
    hashes = sorted({content_hash(piece.text) for pieces in cut for piece in pieces})
    count = max(1, round(share * len(hashes))) if len(hashes) > 1 else 0
    held_out = set(hashes[:count])

    def sided(pieces: Iterable[Document]) -> Iterator[Sided]:
        for piece in sorted(pieces, key=lambda piece: (content_hash(piece.name), piece.name)):
            yield Sided(content_hash(piece.text) in held_out, piece)

    return [sided(pieces) for pieces in cut]


def _cut(document: Document) -> Iterator[Document]:
    if document.chat:
        yield document
        return
    for index, piece in enumerate(_pieces(document.text)):
        yield Document(f"{document.name}.{index}", piece)


def _pieces(text: str) -> Iterator[str]:
    """Cuts at the first empty line after PIECE characters; after twice that at a line end, at worst anywhere."""
    start = 0
    while start < len(text):
        empty_line = text.find("\n\n", start + PIECE, start + 2 * PIECE)
        line_end = text.find("\n", start + 2 * PIECE, start + 3 * PIECE)
        stop = empty_line + 2 if empty_line >= 0 else line_end + 1 if line_end >= 0 else start + 3 * PIECE
        if len(text) - stop < PIECE:
            stop = len(text)
        if text[start:stop].strip():
            yield text[start:stop]
        start = stop
