"""Whether a budget is kept: what tokens cost on text of other kinds, and while generating, with and without control.

    python scripts/bench_budget.py MODEL TEXT.txt [TEXT.txt ...]

MODEL is an exported folder with a calibrated dial. Each text is read token by token behind a prompt, at every budget
of the dial below 1, and continued greedily. Writes benchmarks/budget.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from dynaconv.artifacts.files import write_json
from dynaconv.cli.quiet import silence_libraries
from dynaconv.data.tokenizer import load_tokenizer
from dynaconv.dynamic.dial import Dial
from dynaconv.dynamic.modeling import load
from dynaconv.dynamic.recorder import Recorder

PROMPT = 32  # tokens


def main(
    model: Annotated[Path, typer.Argument(help="Exported folder.")],
    texts: Annotated[list[Path], typer.Argument(help="Texts of other kinds than it was calibrated on.")],
    tokens: Annotated[int, typer.Option(help="Tokens read or generated behind each prompt.")] = 128,
    budgets: Annotated[str, typer.Option(help="Budgets, as 0.1,0.2; those of the dial by default.")] = "",
    sequences: Annotated[int, typer.Option(help="Sequences of each text.")] = 8,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("benchmarks/budget.json"),
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
) -> None:
    """Measures and writes."""
    silence_libraries()
    torch.set_num_threads(threads)
    network, tokenizer, rows = load(model).eval(), load_tokenizer(model), []
    for text in texts:
        ids = sample(tokenizer, text, sequences, PROMPT + tokens)
        for budget in [float(one) for one in budgets.split(",") if one] or network.layout.dial.budgets[:-1]:
            row: dict[str, Any] = {"text": text.name, "budget": budget}
            for controlled in (False, True):
                dial, name = Dial(budget=budget, controlled=controlled), "controlled" if controlled else "uncontrolled"
                row[f"read, {name}"] = read(network, ids, dial)
                row[f"generated, {name}"] = generated(network, ids[:, :PROMPT], dial, tokens)
            rows.append(row)
            typer.echo(
                " ".join(f"{key} {value:.4f}" if isinstance(value, float) else value for key, value in row.items())
            )
    worst = {key: max(abs(row[key] - row["budget"]) for row in rows) for key in rows[0] if "controlled" in key}
    command = f"python scripts/bench_budget.py MODEL {' '.join(text.name for text in texts)} --tokens {tokens}"
    write_json(out, {"command": command, "largest difference": worst, "rows": rows})
    typer.echo(f"largest difference: {worst}")


def sample(tokenizer: Any, text: Path, sequences: int, length: int) -> Tensor:
    """Token ids (sequences, length) from places spread evenly over ``text``."""
    ids = tokenizer(text.read_text(encoding="utf-8", errors="ignore"), add_special_tokens=False, verbose=False)
    tokens = torch.tensor(ids["input_ids"])
    starts = torch.linspace(0, len(tokens) - length - 1, sequences).long()
    return torch.stack([tokens[start : start + length] for start in starts])


@torch.inference_mode()
def read(network: Any, ids: Tensor, dial: Dial) -> float:
    """Mean cost of reading ``ids`` behind the prompt, token by token."""
    recorder = Recorder()
    cache = network(ids[:, :PROMPT], dial=Dial.full(), use_cache=True).past_key_values
    with network.dialed(dial, controlled=True), network.call.using(recorder=recorder):
        for place in range(PROMPT, ids.shape[1]):
            cache = network(ids[:, place : place + 1], past_key_values=cache, use_cache=True).past_key_values
    return float(recorder.all_costs()[2].mean())


@torch.inference_mode()
def generated(network: Any, prompt: Tensor, dial: Dial, tokens: int) -> float:
    """Mean cost of ``tokens`` tokens generated behind ``prompt``."""
    recorder = Recorder()
    with network.call.using(recorder=recorder):
        length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        network.generate(prompt, attention_mask=torch.ones_like(prompt), dial=dial, do_sample=False, **length)
    steps = [torch.stack([one[2].mean() for one in recorder.shares[index][1:]]) for index in sorted(recorder.shares)]
    return float(torch.stack(steps).mean())


if __name__ == "__main__":
    typer.run(main)
