"""Tokens a second at batch 1, the dense parent and every dial in turn, so that a busy machine slows them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def interleaved(candidates: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each candidate over ``rounds``, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            begun = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


def decoding(model: Any, prompt: Tensor, tokens: int, **settings: Any) -> Callable[[], None]:
    """A run that generates exactly ``tokens`` tokens after ``prompt`` (1, T), greedily."""

    def run() -> None:
        model.generate(
            prompt.to(model.device),
            attention_mask=torch.ones_like(prompt).to(model.device),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            **settings,
        )

    return run
