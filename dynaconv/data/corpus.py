"""Text to tokens: reads documents until there are as many tokens as asked for, on each side of the split."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynaconv.config import DataConfig
from dynaconv.data.conversation import require_template
from dynaconv.data.digest import digest
from dynaconv.data.encoding import Encoder, end_of_text
from dynaconv.data.filling import Side, fill, require_enough
from dynaconv.data.mixture import MixedWindows
from dynaconv.data.split import split_sources
from dynaconv.data.store import DiskStore, MemoryStore
from dynaconv.data.tokenizer import tokenizer_digest
from dynaconv.data.windows import Windows
from dynaconv.errors import DataError

__all__ = ["Corpus", "digest", "load_corpus"]

FORMAT = 1  # of tokens on disk
UINT16 = 1 << 16


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
    folder: Path | None = None,
    workers: int | None = None,
) -> Corpus:
    """Reads and tokenises as much of the text as is asked for; the same arguments give the same tokens.

    Documents follow each other in a hash's order, joined by the end-of-text token, so a smaller ``train_tokens`` is a
    prefix and a fair sample of a larger one: whole documents, of which the last may be cut. Documents beyond it are
    never seen, however many epochs there are. The split does not depend on how much is asked for.

    Args:
        config: Where the text is, and how it is split, mixed and cut.
        tokenizer: A transformers tokenizer.
        train_tokens: Training tokens; ``None`` takes all there are, 0 none.
        validation_tokens: The same for the held-out side.
        max_positions: The model's longest sequence (tokens).
        vocabulary: Rows of the model's embedding.
        accept_less: Make do with one window on either side where there is less text than asked for, and say so.
        say: Told, a line each, what was left out or is missing; the log is told by default.
        folder: Where training tokens are kept in files rather than in memory. Called again, by this process or
            another at the same time, it takes what is there and goes on where an interruption left it.
        workers: Processes that tokenise; ``None`` takes the cores there are. They change nothing but the time.

    Raises:
        DataError: Nothing was found, less than asked for or than one window, a missing field, a sequence longer than
            the model's positions, a token the model has no embedding for, or conversations without a chat template.
        ArtifactError: ``folder`` cannot be written.
    """
    _check_length(config, max_positions)
    if config.chat is not None:
        require_template(tokenizer)
    if config.validation is None and config.validation_share == 0 and validation_tokens is None:
        validation_tokens = 0
    say = say or logging.getLogger("dynaconv").warning
    longest = None if config.pack else config.sequence_length
    encoder = Encoder(tokenizer, longest, config.chat is not None, vocabulary)
    skipped: list[str] = []
    train, validation = [], []
    for index, source in enumerate(split_sources(config, skipped=skipped)):
        held_out = 1.0 if source.weight == 0 else source.weight if config.validation is None else 0.0
        store = MemoryStore() if folder is None else _on_disk(folder, index, config, encoder)
        sides = {
            False: Side("training", config, source.name, source.weight, train_tokens, store),
            True: Side("validation", config, source.name, held_out, validation_tokens, MemoryStore()),
        }
        fill(source.documents, sides, encoder, workers)
        train += [sides[False]] if source.weight else []
        validation += [sides[True]] if held_out else []
    if skipped:
        names = ", ".join(skipped[:3]) + (", ..." if len(skipped) > 3 else "")
        say(f"data: {len(skipped)} files left out, not UTF-8 text: {names}")
    unanswered = sum(side.store.amount.unanswered for side in train + validation)
    if unanswered:
        say(f"data: {unanswered} conversations left out, the assistant says nothing in them")
    for sides_together in ([[side] for side in train], [validation]):
        for some in sides_together:
            require_enough(some, say if accept_less else None)
    padding = (end_of_text(tokenizer) or [0])[0]
    return Corpus(_mixed(train, padding), _mixed(validation, padding), digest(config))


def _check_length(config: DataConfig, max_positions: int | None) -> None:
    if config.sequence_length < 2 or config.sequence_length > (max_positions or config.sequence_length):
        raise DataError(
            "the model cannot take sequences this long" if max_positions else "sequences need at least 2 tokens",
            where="data.sequence_length",
            expected=f"2 to {max_positions or 'the model’s positions'} tokens",
            found=config.sequence_length,
            hint=f"data.sequence_length={min(max_positions or 256, 256)}",
        )


def _on_disk(folder: Path, index: int, config: DataConfig, encoder: Encoder) -> DiskStore:
    small = encoder.vocabulary is not None and encoder.vocabulary <= UINT16
    identity = [digest(config), config.weights is not None, index, encoder.longest, encoder.chat, small]
    record = json.dumps([FORMAT, tokenizer_digest(encoder.tokenizer), end_of_text(encoder.tokenizer), *identity])
    key = hashlib.sha256(record.encode()).hexdigest()
    return DiskStore(folder, f"train-{index}", key, small=small, lengths=not config.pack, scored=encoder.chat)


def _mixed(sides: list[Side], padding: int) -> Windows:
    """The windows of ``sides``, mixed by weight where there are several."""
    windows = [side.windows(padding) for side in sides]
    weights = [side.weight for side, own in zip(sides, windows, strict=True) if len(own)]
    several = [own for own in windows if len(own)]
    if len(several) > 1:
        return MixedWindows(several, [weight / sum(weights) for weight in weights])
    return [*several, *windows][0]
