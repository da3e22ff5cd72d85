"""Fills both sides of the split with tokens, from as few documents as that takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import torch

from dynaconv.config import DataConfig
from dynaconv.data.encoding import Encoder, encode_in_order
from dynaconv.data.readers import Document
from dynaconv.data.split import Sided
from dynaconv.data.store import DiskStore, Store
from dynaconv.data.windows import PaddedWindows, Windows
from dynaconv.errors import DataError

BATCH = 1 << 18  # characters given to the tokenizer at once
_LOWER = {
    "training": "lower profile.tokens or finetune.tokens, or give more text with data=PATH|NAME",
    "validation": "lower calibrate.tokens and calibrate.score_tokens, raise data.validation_share, "
    "or give more text with data=PATH|NAME or data.validation",
}


@dataclass
class Side:
    """Tokens of one side of one source, gathered until there are enough.

    Attributes:
        name: ``training`` or ``validation``.
        config: How text is cut.
        source: The text, as the user named it.
        weight: The source's share of ``asked``.
        asked: Tokens asked for of all sources together; ``None`` takes all there are.
        store: Where the tokens go.
    """

    name: str
    config: DataConfig
    source: str
    weight: float
    asked: int | None
    store: Store
    pending: list[Document] = field(default_factory=list)
    characters: int = 0

    @property
    def wanted(self) -> int | None:
        """Tokens asked for of this source, in whole windows."""
        length = self.config.sequence_length
        return None if self.asked is None else math.ceil(math.ceil(self.asked / length) * self.weight) * length

    @property
    def full(self) -> bool:
        """Whether no more are needed, or there are no more."""
        return self.store.amount.ended or (self.wanted is not None and self.store.amount.tokens >= self.wanted)

    def add(self, document: Document) -> bool:
        """Holds ``document`` back to be tokenised with others; says whether they are enough for a batch."""
        self.pending.append(document)
        self.characters += len(document.text)
        return self.characters >= BATCH

    def taken(self) -> list[Document]:
        """What was held back."""
        pending, self.pending, self.characters = self.pending, [], 0
        return pending

    def windows(self, padding: int) -> Windows:
        """As many as were asked for, or as there are."""
        length, stored = self.config.sequence_length, self.store.read()
        if self.config.pack:
            scored = None if stored.scored is None else stored.scored[: self.wanted]
            return Windows(stored.tokens[: self.wanted], length, scored)
        count = len(stored.lengths)
        if self.wanted is not None:  # as many as reach the wanted tokens: batches may have brought more
            count = int(torch.searchsorted(stored.lengths.cumsum(0), self.wanted)) + 1 if self.wanted else 0
        return PaddedWindows(stored.tokens, stored.lengths[:count], length, padding, stored.scored)


def fill(documents: Iterator[Sided], sides: Mapping[bool, Side], encoder: Encoder, workers: int | None) -> None:
    """Reads and tokenises ``documents`` until both sides (True is held out) have what they want or nothing is left.

    Raises:
        DataError: As :func:`~dynaconv.data.encoding.encode_in_order`, or the text cannot be read.
        ArtifactError: A store cannot be written.
    """
    if all(side.full for side in sides.values()):
        return
    with ExitStack() as stack:
        filled = [side for side in sides.values() if not side.full]
        for side in filled:
            if isinstance(side.store, DiskStore):
                stack.enter_context(side.store.writing(side.wanted))  # another process may have filled it meanwhile
        ended: list[bool] = []
        encoded = stack.enter_context(closing(encode_in_order(encoder, _batches(documents, sides, ended), workers)))
        for held_out, batch in encoded:
            if not sides[held_out].full:  # what was tokenised ahead may be too much
                sides[held_out].store.append(batch)
        for side in filled:
            side.store.finish(ended=side.store.amount.ended or (bool(ended) and not side.full))


def _batches(
    documents: Iterator[Sided], sides: Mapping[bool, Side], ended: list[bool]
) -> Iterator[tuple[bool, list[Document]]]:
    """Documents of sides that are not full, a batch of one side at a time; ``ended`` gets an item at their end."""
    known = {held_out: side.store.amount.documents for held_out, side in sides.items()}
    for held_out, document in documents:
        if all(side.full for side in sides.values()):
            return
        if known[held_out]:
            known[held_out] -= 1
        elif not sides[held_out].full and sides[held_out].add(document):
            yield held_out, sides[held_out].taken()
    ended.append(True)
    for held_out, side in sides.items():
        if side.pending:
            yield held_out, side.taken()


def require_enough(sides: Sequence[Side], say: Callable[[str], None] | None) -> None:
    """Refuses where ``sides`` have too few tokens together; with ``say``, tells it as long as there is one window.

    Raises:
        DataError: Less than asked for, or than one window.
    """
    if not sides or sides[0].wanted == 0:
        return
    config, name = sides[0].config, sides[0].name
    least = config.sequence_length if config.pack else 1
    tokens = sum(side.store.amount.tokens for side in sides)
    wanted = max(least, sum(side.wanted or 0 for side in sides))
    if tokens >= wanted:
        return
    of = f" of {sides[0].source}" if config.weights and len(sides) == 1 else ""
    if say is not None and tokens >= least:
        say(f"data: {wanted} {name} tokens{of} asked for, making do with {tokens}")
        return
    one_window = wanted == least
    raise DataError(
        f"not enough {name} text" if tokens else f"no {name} text",
        where="data=" + ",".join(side.source for side in sides),
        expected=f"{wanted} tokens" + (", one window," if one_window else "") + " or more",
        found=f"{tokens} tokens",
        hint="lower data.sequence_length, or give more text with data=PATH|NAME" if one_window else _LOWER[name],
    )
