"""What fine-tuning needs to know of single neurons before its first step: budgets, means, where values are exact."""

from __future__ import annotations

from typing import Any

from dynaconv.config import FinetuneConfig
from dynaconv.data.windows import Windows, training_batch
from dynaconv.pipeline.stage import StageContext
from dynaconv.profile.gated import exact_margin, prepare_means, solve_neurons
from dynaconv.rules import require_affordable
from dynaconv.train.precision import autocast

NODES = 4
"""Budgets at which means are trained; between them they are interpolated."""
MEAN_TOKENS = 8192
"""Training tokens that means are measured on before they are trained."""
NEURONS, BLOCKS = (1 / 16, 0.6), (0.2, 0.75)
"""Shares of neurons used at the lowest and the highest budget, where the recipe names none."""


def training_budgets(network: Any, tuning: FinetuneConfig) -> list[float]:
    """The lowest and the highest budget that the recipe trains at, or those of :data:`NEURONS` or :data:`BLOCKS`.

    Raises:
        ConfigError: The lowest is below what the routers read for every token.
    """
    ffn = network.ffns()[0]
    cost = ffn.cost.bytes
    if tuning.budgets is None:
        if ffn.router.experts != "neurons":
            return [cost.of(share, share, 0.0) for share in BLOCKS]
        low, high = NEURONS
        exact = 0.0 if cost.low else 1.0
        return [cost.of(low, exact * low, 2 * low), cost.of(high, exact * high, 1.0)]
    require_affordable("finetune.budgets", tuning.budgets, cost.fixed)
    return tuning.budgets


def prepare_neurons(
    network: Any, windows: Windows, tuning: FinetuneConfig, context: StageContext, *, measured: bool
) -> float:
    """Gives ``network`` means to train, where the recipe wants means.

    Args:
        network: The model to train.
        windows: Its training text.
        tuning: The ``finetune`` section, budgets included.
        context: Of the stage.
        measured: Measure the means on the first training text, every rank on the same; else they are zeros until a
            saved state is loaded.

    Returns:
        How far above the threshold of being used a neuron has exact values (see :func:`exact_margin`).
    """
    config = context.config
    assert tuning.budgets is not None
    low, high = tuning.budgets
    network.to(context.ranks.device).eval()
    with autocast(tuning, context.ranks.device):
        margin = exact_margin(network)
        if not config.sketch.means:
            return margin
        nodes = sorted({low * (high / low) ** (node / (NODES - 1)) for node in range(NODES)})
        prepare_means(network, nodes)
        if measured:
            steps = max(1, MEAN_TOKENS // (tuning.batch_size * config.data.sequence_length))
            batches = [training_batch(windows, step, tuning.batch_size, config.seed) for step in range(steps)]
            solve_neurons(network, batches, nodes, measure_means=True)
    return margin
