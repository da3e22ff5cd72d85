"""A run on conversations mixed with text, up to the tuned checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import convert, documents_file, tiny_config

from dynaconv.errors import DataError

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("pack", [True, False])
def test_conversations_and_text_are_trained_on(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], text_file: Path, pack: bool
) -> None:
    source = tiny_checkpoint()
    roles = [{"role": role} for role in ("user", "assistant")]
    made = [[{**role, "content": f"{role} {i}"} for role in roles] for i in range(250)]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in made))
    config = tiny_config(source, text_file)
    files = [str(tmp_path / "chat.jsonl"), str(documents_file(tmp_path, text_file, 100))]
    config.data = replace(config.data, train=files, weights=[0.6, 0.4], chat="messages", pack=pack)
    with pytest.raises(DataError, match="no chat template"):
        convert(config, tmp_path / "run", until="finetune")
    (source / "chat_template.jinja").write_text(TEMPLATE)
    *_, tuned = convert(config, tmp_path / "run", until="finetune")
    losses = [json.loads(line)["loss_full"] for line in (tuned.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert not list((tmp_path / "run").rglob("*.tokens"))  # they lie there only while they are needed
