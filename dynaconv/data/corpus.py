"""Text to tokens: reads documents until there are as many tokens as asked for, on each side of the split."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynaconv.config import DataConfig
from dynaconv.data.digest import digest
from dynaconv.data.split import split_documents
from dynaconv.data.windows import PaddedWindows, Windows
from dynaconv.errors import DataError

__all__ = ["Corpus", "digest", "load_corpus"]

BATCH = 1 << 18  # characters given to the tokenizer at once
_LOWER = {
    "training": "lower profile.tokens or finetune.tokens, or give more text with data=PATH|NAME",
    "validation": "lower calibrate.tokens and calibrate.score_tokens, raise data.validation_share, "
    "or give more text with data=PATH|NAME or data.validation",
}


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on, tokens held out, and the identity of the text they come from."""

    train: Windows
    validation: Windows
    digest: str


def load_corpus(
    config: DataConfig,
    tokenizer: Any,
    *,
    train_tokens: int | None = None,
    validation_tokens: int | None = None,
    max_positions: int | None = None,
    vocabulary: int | None = None,
    accept_less: bool = False,
    say: Callable[[str], None] | None = None,
) -> Corpus:
    """Reads and tokenises as much of the text as is asked for; the same arguments give the same tokens.

    Documents follow each other in a hash's order, joined by the end-of-text token, so a smaller ``train_tokens`` is a
    prefix and a fair sample of a larger one. The split does not depend on how much is asked for.

    Args:
        config: Where the text is, and how it is split and cut.
        tokenizer: A transformers tokenizer.
        train_tokens: Training tokens; ``None`` takes all there are, 0 none.
        validation_tokens: The same for the held-out side.
        max_positions: The model's longest sequence (tokens).
        vocabulary: Rows of the model's embedding.
        accept_less: Make do with one window on either side where there is less text than asked for, and say so.
        say: Told, a line each, what was left out or is missing; the log is told by default.

    Raises:
        DataError: Nothing was found, less than asked for or than one window, a missing field, a sequence longer than
            the model's positions, or a token the model has no embedding for.
    """
    if config.sequence_length < 2 or config.sequence_length > (max_positions or config.sequence_length):
        raise DataError(
            "the model cannot take sequences this long" if max_positions else "sequences need at least 2 tokens",
            where="data.sequence_length",
            expected=f"2 to {max_positions or 'the model’s positions'} tokens",
            found=config.sequence_length,
            hint=f"data.sequence_length={min(max_positions or 256, 256)}",
        )
    if config.validation is None and config.validation_share == 0 and validation_tokens is None:
        validation_tokens = 0
    sides = {
        False: _Side("training", config, tokenizer, train_tokens, vocabulary),
        True: _Side("validation", config, tokenizer, validation_tokens, vocabulary),
    }
    skipped: list[str] = []
    for held_out, document in split_documents(config, skipped=skipped):
        sides[held_out].add(document.text)
        if all(side.full for side in sides.values()):
            break
    say = say or logging.getLogger("dynaconv").warning
    if skipped:
        names = ", ".join(skipped[:3]) + (", ..." if len(skipped) > 3 else "")
        say(f"data: {len(skipped)} files left out, not UTF-8 text: {names}")
    for side in sides.values():
        side.tokenise()
        side.check_amount(say if accept_less else None)
    return Corpus(sides[False].windows(), sides[True].windows(), digest(config))


class _Side:
    """Tokens of one side of the split, gathered until there are enough."""

    def __init__(
        self, name: str, config: DataConfig, tokenizer: Any, wanted: int | None, vocabulary: int | None
    ) -> None:
        self.name, self.config, self.tokenizer, self.vocabulary = name, config, tokenizer, vocabulary
        length = config.sequence_length
        self.wanted = None if wanted is None else math.ceil(wanted / length) * length  # whole windows
        self.end = _end_of_text(tokenizer)
        self.documents: list[Tensor] = []
        self.tokens = 0
        self.pending: list[str] = []
        self.pending_characters = 0

    @property
    def full(self) -> bool:
        return self.wanted is not None and self.tokens >= self.wanted

    def add(self, text: str) -> None:
        if self.full:
            return
        self.pending.append(text)
        self.pending_characters += len(text)
        if self.pending_characters >= BATCH:
            self.tokenise()

    def tokenise(self) -> None:
        if not self.pending:
            return
        encoded = self.tokenizer(
            self.pending,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        for ids in encoded:
            document = torch.tensor([*ids, *self.end], dtype=torch.int32)
            self._check(document)
            self.documents.append(document)
            self.tokens += len(document) if self.config.pack else min(len(document), self.config.sequence_length)
        self.pending, self.pending_characters = [], 0

    def check_amount(self, say: Callable[[str], None] | None) -> None:
        """Raises where there is too little; with ``say``, tells it as long as there is one window."""
        least = self.config.sequence_length if self.config.pack else 1
        wanted = max(least, self.wanted or 0)
        if self.wanted == 0 or self.tokens >= wanted:
            return
        if say is not None and self.tokens >= least:
            say(f"data: {wanted} {self.name} tokens asked for, making do with {self.tokens}")
            return
        specs = self.config.train if self.name == "training" else self.config.validation or self.config.train
        one_window = wanted == least
        raise DataError(
            f"not enough {self.name} text" if self.tokens else f"no {self.name} text",
            where=f"data={','.join(specs)}",
            expected=f"{wanted} tokens" + (", one window," if one_window else "") + " or more",
            found=f"{self.tokens} tokens",
            hint="lower data.sequence_length, or give more text with data=PATH|NAME"
            if one_window
            else _LOWER[self.name],
        )

    def windows(self) -> Windows:
        length = self.config.sequence_length
        if not self.config.pack:
            return PaddedWindows(self._whole_documents(), length, self.end[0] if self.end else 0)
        stream = torch.cat(self.documents) if self.documents else torch.empty(0, dtype=torch.int32)
        return Windows(stream[: self.wanted], length)

    def _whole_documents(self) -> list[Tensor]:
        """As many documents as reach the wanted tokens: the tokenizer's batches may have brought more."""
        chosen, tokens = [], 0
        for document in self.documents:
            if self.wanted is not None and tokens >= self.wanted:
                break
            chosen.append(document)
            tokens += min(len(document), self.config.sequence_length)
        return chosen

    def _check(self, document: Tensor) -> None:
        largest = int(document.max()) if len(document) else 0
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise DataError(
                "the tokenizer is not this model's",
                expected=f"token ids below {self.vocabulary}, the rows of the embedding",
                found=f"token id {largest}",
                hint="keep the tokenizer files that came with the checkpoint",
            )


def _end_of_text(tokenizer: Any) -> list[int]:
    """The token that ends a document; none where the tokenizer has no end of text."""
    for name in ("eos_token_id", "bos_token_id", "sep_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return [int(found)]
    return []
