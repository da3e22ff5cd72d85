"""The model card of an exported folder: what it is, where it came from, what was measured, how to use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dynaconv.arch.blocks import partition_text
from dynaconv.dynamic.layout import Layout
from dynaconv.dynamic.routers.kinds import KINDS
from dynaconv.frontier import UNITS, Frontier, OperatingPoint
from dynaconv.version import __version__

_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = tokenizer("def main():", return_tensors="pt")

dense = AutoModelForCausalLM.from_pretrained(folder)  # a plain model, all blocks on
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)  # the same weights with a dial
print(tokenizer.decode(model.generate(**prompt, dial=0.5, max_new_tokens=40)[0]))
```"""

PROMPTED = (
    " Prompted quality is that of the second half of each sequence, the first half of which was read at the full dial."
)
EXACT = "Active neurons have the checkpoint's own values at every budget; no low-bit values stand in for them."
LOW_BIT = (
    "Below the full dial some of the active neurons are computed from low-bit values, which are made from the weights "
    "in this folder; the others have the checkpoint's own values. The weights in the folder are not quantised."
)

Columns = dict[str, Callable[[OperatingPoint], str]]
"""A point's cell by the header of its column."""


def model_card(layout: Layout, parent: str, training: Mapping[str, Any]) -> str:
    """Markdown with transformers' front matter.

    Args:
        layout: Blocks, routers, and the frontier that calibration measured.
        parent: Name of the dense checkpoint.
        training: Resolved ``finetune`` section where the model was tuned, else empty.
    """
    kind = {"none": "none: every token gets the same width"}.get(layout.router.kind, f"`{layout.router.kind}`")
    frontier, routed = layout.frontier, KINDS[layout.router.kind].experts == "routed"
    assert frontier is not None, "calibrate comes before export"
    which = "which" if routed else "how many"
    if layout.partition.block_size == 1:
        routing = f"In each layer a router says {which} of the FFN's {layout.blocks} neurons a token uses."
    else:
        cut = f"Its feed-forward networks are cut into {layout.blocks} blocks of neurons"
        routing = f"{cut}, and a router in each layer says {which} of them a token uses."
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [dynaconv, dynamic-ffn]",
        "---",
        "",
        f"# {parent} with a dial",
        "",
        f"Made from `{parent}` by dynaconv {__version__}. {routing} At the full dial, it is a plain dense checkpoint.",
        "",
        "## Use",
        "",
        _USE,
        "",
        "## What was measured",
        "",
        f"A dial is a budget: {UNITS[frontier.unit]}. {LOW_BIT if frontier.reads_low_bit_values else EXACT}",
        "",
        _table(frontier),
        "",
        "![frontier](frontier.png)",
        "",
        "Quality is exp(parent loss - loss): 1 is the parent's perplexity. Loss is in nats a token on "
        f"{frontier.scored_tokens} tokens of held-out text; tokens/s is generation at batch 1 on "
        "the machine that made this. FLOPs and bytes a token are the whole model's and include the routers, which do "
        f"not run at the full dial.{PROMPTED if _prompted(frontier) else ''}",
        "",
        "## Lineage",
        "",
        f"- parent: `{parent}`",
        f"- {partition_text(layout.layers, layout.partition)}",
        f"- router: {kind}",
        *([f"- fine-tuned on {training['tokens']:,} tokens, target `{training['router']}`"] if training else []),
        *(f"- stage `{name}`: fingerprint `{mark}`" for name, mark in layout.lineage.get("stages", {}).items()),
        "",
    ]
    return "\n".join(lines)


def _table(frontier: Frontier) -> str:
    columns = _columns(frontier)
    rows = [["dial", *columns], ["---"] * (1 + len(columns))]
    rows.append(["dense parent", *(cell(frontier.parent) for cell in columns.values())])
    rows += [[f"{point.budget:g}", *(cell(point) for cell in columns.values())] for point in frontier.points]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _columns(frontier: Frontier) -> Columns:
    costs: Columns = {
        "FFN bytes": lambda point: f"{point.bytes_share:.3f}",
        "FFN FLOPs": lambda point: f"{point.flops_share:.3f}",
    }
    exact: Columns = {"exact neurons": lambda point: f"{point.exact_share:.3f}"}
    prompted: Columns = {"prompted quality": lambda point: _number(point.prompted_quality, ".4f")}
    return {
        **(costs if frontier.unit == "bytes" else {}),
        "active neurons": lambda point: f"{point.active_share:.3f}",
        **(exact if frontier.reads_low_bit_values else {}),
        "loss": lambda point: f"{point.loss:.4f}",
        "quality": lambda point: f"{point.quality:.4f}",
        **(prompted if _prompted(frontier) else {}),
        "agrees with parent": lambda point: f"{point.agreement:.3f}",
        "GFLOPs/token": lambda point: f"{point.flops_per_token / 1e9:.4g}",
        "MB/token": lambda point: f"{point.bytes_per_token / 1e6:.4g}",
        "tokens/s": lambda point: _number(point.tokens_per_s, ".0f"),
    }


def _prompted(frontier: Frontier) -> bool:
    return any(point.prompted_quality is not None for point in frontier.points)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
