"""Which documents are trained on and which are held out: decided by their content, never by their place.

Identical documents fall on the same side, and the answer for one document depends on no other. Only where there are
too few documents to draw a share of them (a single text file, say) are they cut into pieces first, and the pieces with
the smallest hashes held out.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dynaconv.config import DataConfig
from dynaconv.data.readers import Document
from dynaconv.data.sources import documents

FEW = 200  # documents; with fewer, a share of 5 % held out by chance may be none
PIECE = 2048  # characters of a piece of a document, at least


class Sided(NamedTuple):
    """A document and the side it is on."""

    held_out: bool
    document: Document


def content_hash(text: str) -> bytes:
    """Identity of a document."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def split_documents(config: DataConfig, *, skipped: list[str] | None = None) -> Iterator[Sided]:
    """All documents of ``config``, each with its side, lazily and in a fixed order.

    With ``config.validation`` that text is held out whole, and documents of ``config.train`` that also occur in it
    are left out.

    Raises:
        DataError: See :func:`dynaconv.data.sources.documents`.
    """
    if config.validation is not None:
        seen = set()
        for document in documents(config.validation, config, split="validation", skipped=skipped):
            seen.add(content_hash(document.text))
            yield Sided(True, document)
        for document in documents(config.train, config, skipped=skipped):
            if content_hash(document.text) not in seen:
                yield Sided(False, document)
        return
    stream = documents(config.train, config, skipped=skipped)
    head = list(itertools.islice(stream, FEW))
    if len(head) < FEW and config.validation_share > 0:
        yield from _split_few(head, config.validation_share)
        return
    for document in itertools.chain(head, stream):
        yield Sided(_is_held_out(document.text, config.validation_share), document)


def _is_held_out(text: str, share: float) -> bool:
    return int.from_bytes(content_hash(text)[:8]) < share * 2**64


def _split_few(few: Iterable[Document], share: float) -> Iterator[Sided]:
    pieces = [
        Document(f"{document.name}.{index}", piece)
        for document in few
        for index, piece in enumerate(_pieces(document.text))
    ]
    pieces.sort(key=lambda piece: (content_hash(piece.name), piece.name))
    hashes = sorted({content_hash(piece.text) for piece in pieces})
    count = max(1, round(share * len(hashes))) if len(hashes) > 1 else 0
    held_out = set(hashes[:count])
    for piece in pieces:
        yield Sided(content_hash(piece.text) in held_out, piece)


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
