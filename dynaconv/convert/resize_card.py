"""The model card of a resized checkpoint: what it is made from, what was kept, and how that was checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dynaconv.version import __version__

CARD_FILE = "README.md"
METHODS = {
    "subclone": "a smaller model cut out of `{source}` by weight subcloning (arXiv 2312.09299): what matters most on "
    "calibration text stays, and weights are scaled for the narrower inputs. It is a start for training, not a "
    "finished model",
    "hyperclone": "a larger model grown from `{source}` by HyperCloning (arXiv 2409.12903): it computes what the "
    "source computes, and has room to learn more",
}
TRAINING = (
    "To train it, tune the learning rate anew. The papers take a fraction of a random start's, since one that is too "
    "high destroys what was copied; on small models dynaconv's own benchmark found the random start's best."
)


def resize_card(stage: str, source: str, metrics: Mapping[str, Any]) -> str:
    """Markdown with transformers' front matter.

    Args:
        stage: ``subclone`` or ``hyperclone``.
        source: Name of the checkpoint it is made from.
        metrics: What the stage's manifest entry says.
    """
    old, new, found = metrics["from"], metrics["to"], metrics["comparison"]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [dynaconv, {stage}]",
        "---",
        "",
        f"# {source}, resized",
        "",
        f"Made by dynaconv {__version__}: {METHODS[stage].format(source=source)}.",
        "",
        "| | source | this model |",
        "|---|---|---|",
        *(f"| {name} | {old[name]:,} | {new[name]:,} |" for name in old),
        "",
        "## What was checked",
        "",
        f"Source and result were run on the same {found['tokens']} tokens, layer by layer. Largest difference of a "
        f"logit: {found['difference']:.3g}, {found['relative']:.3g} of the largest logit. {_told(stage, found)}",
        "",
        TRAINING,
        "",
        "## What was decided",
        "",
        *(f"- {name.replace('_', ' ')}: `{json.dumps(value)}`" for name, value in metrics["decided"].items()),
        "",
    ]
    return "\n".join(lines)


def _told(stage: str, found: Mapping[str, Any]) -> str:
    """What the comparison says beyond the difference; the loss of random tokens would say nothing."""
    agreement = f"The likeliest next token is the same for {found['agreement']:.1%} of the tokens"
    if stage == "hyperclone":
        return f"{agreement}, which are random."
    losses = f"{found['source_loss']:.4f} nats a token (source), {found['result_loss']:.4f} (this model)"
    return f"{agreement}, which are of the calibration text; loss there: {losses}."
