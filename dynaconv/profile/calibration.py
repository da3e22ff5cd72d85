"""The calibration text of a stage that measures a checkpoint, as batches of windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.pipeline.stage import StageContext

if TYPE_CHECKING:
    from dynaconv.data.windows import Batch


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
