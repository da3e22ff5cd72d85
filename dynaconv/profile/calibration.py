"""The calibration text of a stage that measures a checkpoint, as batches of windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.errors import ConfigError
from dynaconv.pipeline.stage import StageContext
from dynaconv.ranks import Ranks

if TYPE_CHECKING:
    from dynaconv.data.windows import Batch


def own_rows(batches: Sequence[Batch], ranks: Ranks, *, what: str) -> list[Batch]:
    """This rank's windows of every batch, so that all ranks have as much to do in each.

    Args:
        batches: The same on every rank.
        ranks: The processes that share them.
        what: Where the batch size is set, for the message.

    Raises:
        ConfigError: There are more ranks than the batches have sequences.
    """
    if ranks.world == 1:
        return list(batches)
    parts = [batch.rows(*ranks.rows(len(batch.input_ids))) for batch in batches]
    most = max((len(batch.input_ids) for batch in batches), default=0)
    if most < ranks.world:
        hint = f"raise {what}, or start fewer processes"
        raise ConfigError(f"{ranks.world} processes, and batches of {most} sequences: some would get none", hint=hint)
    return [part for part in parts if len(part.input_ids)]


def calibration_batches(
    checkpoint: Checkpoint, context: StageContext, *, tokens: int, batch_size: int
) -> tuple[list[Batch], str]:
    """Batches of the training side of the recipe's text, and the text's digest.

    Args:
        checkpoint: Whose tokenizer and longest sequence.
        context: The stage's recipe and progress.
        tokens: How many tokens.
        batch_size: Windows in a batch.

    Raises:
        CheckpointError: The tokenizer is missing or damaged.
        DataError: The text is missing or too small.
    """
    from dynaconv.data.corpus import load_corpus
    from dynaconv.data.tokenizer import load_tokenizer
    from dynaconv.data.windows import evaluation_batches

    config = context.config
    corpus = load_corpus(
        config.data,
        load_tokenizer(checkpoint.folder, trust_remote_code=config.trust_remote_code),
        train_tokens=tokens,
        validation_tokens=0,
        max_positions=checkpoint.max_positions,
        vocabulary=checkpoint.sizes["vocab"],
        say=context.progress.say,
    )
    return list(evaluation_batches(corpus.train, batch_size, seed=config.seed)), corpus.digest
