"""The model card of an exported folder: what it is, where it came from, what was measured, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynaconv.arch.blocks import partition_text
from dynaconv.dynamic.layout import Layout
from dynaconv.dynamic.routers.kinds import KINDS
from dynaconv.frontier import Frontier, OperatingPoint
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
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [dynaconv, dynamic-ffn]",
        "---",
        "",
        f"# {parent} with a dial",
        "",
        f"Made from `{parent}` by dynaconv {__version__}. Its feed-forward networks are cut into {layout.blocks} "
        f"blocks of neurons, and a router in each layer says {'which' if routed else 'how many'} of them a "
        "token uses. With every block on, it is a plain dense checkpoint.",
        "",
        "## Use",
        "",
        _USE,
        "",
        "## What was measured",
        "",
        _table(frontier),
        "",
        "![frontier](frontier.png)",
        "",
        "Quality is exp(parent loss - loss): 1 is the parent's perplexity. Loss is in nats a token on "
        f"{frontier.scored_tokens} tokens of held-out text; tokens/s is generation at batch 1 on "
        "the machine that made this. FLOPs and bytes include the routers, which do not run with every block on.",
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
    rows = [
        "| dial | active share | loss | quality | agrees with parent | GFLOPs/token | MB/token | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
        _row("dense parent", frontier.parent),
        *(_row(f"{point.budget:g}", point) for point in frontier.points),
    ]
    return "\n".join(rows)


def _row(name: str, point: OperatingPoint) -> str:
    cells = [
        name,
        f"{point.active_share:.3f}",
        f"{point.loss:.4f}",
        f"{point.quality:.4f}",
        f"{point.agreement:.3f}",
        f"{point.flops_per_token / 1e9:.4g}",
        f"{point.bytes_per_token / 1e6:.4g}",
        "" if point.tokens_per_s is None else f"{point.tokens_per_s:.0f}",
    ]
    return f"| {' | '.join(cells)} |"
