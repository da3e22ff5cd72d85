"""Perplexity of a folder on text, with everything in the record that it depends on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dynaconv.config import DataConfig
from dynaconv.errors import CheckpointError

TOKENS = 65536
BATCH = 16


def evaluate_folder(
    folder: Path, dial: Any, data: DataConfig, *, tokens: int = TOKENS, seed: int = 0, values: str = "exact"
) -> dict[str, Any]:
    """Scores a converted or a dense model on ``data.train``, all of which counts as held out.

    Windows are ``data.sequence_length`` tokens without overlap; each window's first token is not predicted.

    Args:
        folder: A converted folder, or a dense checkpoint.
        dial: A :class:`~dynaconv.dynamic.dial.Dial`; ``None`` takes the model's stored point. Dense models ignore it.
        data: What to score on.
        tokens: Tokens scored at most; a fixed random choice of windows where there are more.
        seed: Draws that choice.
        values: ``low-bit`` holds the FFNs' low-bit values alone (see :func:`~dynaconv.dynamic.modeling.load`). Dense
            models ignore it.

    Returns:
        ``loss`` (nats a token), ``perplexity``, ``bytes_share`` and ``flops_share`` (of the FFNs, routers counted),
        ``active_share`` (of neurons), ``dial``, ``tokens``, ``sequence_length``, ``data``, ``data_digest``.

    Raises:
        DataError: There is no text, or less than one window.
        CheckpointError: The tokenizer is missing or is not the model's, or the model has no low-bit values.
    """
    import torch

    from dynaconv.arch.stock import load_dense
    from dynaconv.data.corpus import load_corpus
    from dynaconv.data.tokenizer import load_tokenizer
    from dynaconv.data.windows import evaluation_batches
    from dynaconv.dynamic.layout import LAYOUT_FILE
    from dynaconv.dynamic.modeling import load
    from dynaconv.evaluation.scoring import score

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dynamic = (folder / LAYOUT_FILE).is_file()
    try:
        model = load(folder, values=values).to(device) if dynamic else load_dense(folder, device)
    except ValueError as error:
        raise CheckpointError("the model cannot be loaded so", where=folder, found=error) from error
    windows = load_corpus(
        replace(data, validation=None, validation_share=0.0),
        load_tokenizer(folder),
        train_tokens=tokens,
        validation_tokens=0,
        max_positions=model.config.max_position_embeddings,
        vocabulary=model.config.vocab_size,
        accept_less=True,
    )
    batches = list(evaluation_batches(windows.train, BATCH, tokens, seed))
    got = score(model, batches, model.policy(dial) if dynamic else None)
    shown = None if not dynamic else str(dial or model.dial)
    return {
        "loss": got.loss,
        "perplexity": got.perplexity,
        "bytes_share": got.bytes_share,
        "flops_share": got.flops_share,
        "active_share": got.active_share,
        "dial": shown,
        "tokens": got.tokens,
        "sequence_length": data.sequence_length,
        "data": ",".join(data.train),
        "data_digest": windows.digest,
    }
