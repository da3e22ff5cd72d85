"""Conversations go through the tokenizer's template, and only what the assistant says is predicted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaconv.config import DataConfig
from dynaconv.data import hub
from dynaconv.data.conversation import canonical, encode
from dynaconv.data.corpus import load_corpus
from dynaconv.data.digest import digest
from dynaconv.data.split import split_documents
from dynaconv.data.tokenizer import load_tokenizer
from dynaconv.data.windows import Batch, training_batch
from dynaconv.errors import DataError

MARKED = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = (  # drops the thoughts of all answers but the last
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' and loop.last %}<think>{{ message.thought }}</think>{% endif %}"
    "{{ message.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def scored_text(tokenizer: Any, messages: Any) -> list[tuple[str, str]]:
    """Text of each sample, and what of it is predicted, pieces joined by ``|``."""
    found = []
    for ids, scored in encode(tokenizer, canonical(messages, "here"), "here"):
        runs = [[i] for i in range(len(ids)) if scored[i] and (i == 0 or not scored[i - 1])]
        for run in runs:
            while run[-1] + 1 < len(ids) and scored[run[-1] + 1]:
                run.append(run[-1] + 1)
        found.append((tokenizer.decode(ids), "|".join(tokenizer.decode([ids[i] for i in run]) for run in runs)))
    return found


def test_answers_are_what_the_template_adds_for_them(chat_tokenizer: Any) -> None:
    ((text, scored),) = scored_text(chat_tokenizer, turns("hi", "hello", "bye", "see you"))
    assert text == "<|user|>hi<|end|>\n<|assistant|>hello<|end|>\n<|user|>bye<|end|>\n<|assistant|>see you<|end|>\n"
    assert scored == "hello<|end|>\n|see you<|end|>\n"


def test_marked_answers_are_what_the_template_says(tokenizer: Any) -> None:
    tokenizer.chat_template = MARKED
    ((text, scored),) = scored_text(tokenizer, turns("hi", "hello", "bye", "see you"))
    assert text.endswith("<|assistant|>see you<|end|>\n")
    assert scored == "hello<|end|>|see you<|end|>"


def test_a_template_that_rewrites_earlier_turns_gives_a_sample_an_answer(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETFUL
    messages = [{**message, "thought": f"thought {i}"} for i, message in enumerate(turns("a", "b", "c", "d"))]
    assert scored_text(tokenizer, messages) == [
        ("<|user|>a<|end|>\n<|assistant|><think>thought 1</think>b<|end|>\n", "<think>thought 1</think>b<|end|>\n"),
        (
            "<|user|>a<|end|>\n<|assistant|>b<|end|>\n<|user|>c<|end|>\n"
            "<|assistant|><think>thought 3</think>d<|end|>\n",
            "<think>thought 3</think>d<|end|>\n",
        ),
    ]


def test_what_answers_nothing_is_not_predicted(chat_tokenizer: Any) -> None:
    assert scored_text(chat_tokenizer, turns("hi")) == []
    ((_, scored),) = scored_text(chat_tokenizer, turns("welcome", "hi", "hello", first="assistant"))
    assert scored == "hello<|end|>\n"


@settings(max_examples=40)
@given(contents=st.lists(st.text(st.sampled_from("aé漢 \n<|end>"), max_size=6), min_size=2, max_size=6))
def test_both_ways_of_finding_answers_agree(tokenizer_folder: Path, contents: Sequence[str]) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    messages = canonical(turns(*contents), "here")
    tokenizer.chat_template = MARKED
    marked = encode(tokenizer, messages, "here")
    tokenizer.chat_template = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    by_prefix = encode(tokenizer, messages, "here")
    assert [sample.ids for sample in marked] == [sample.ids for sample in by_prefix]
    for one, other in zip(marked, by_prefix, strict=True):  # the line end after <|end|> is the template's own
        line_end = tokenizer.convert_tokens_to_ids("Ċ")
        closing = [i for i in range(len(one.ids)) if other.scored[i] and not one.scored[i]]
        assert all(one.ids[i] == line_end for i in closing)
        assert sum(other.scored) == sum(one.scored) + len(contents) // 2


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", r"no conversation[\s\S]*found: str"),
        ([{"content": "x"}], r"no role[\s\S]*found: content"),
        (["x"], r"no role[\s\S]*found: str"),
        ([{"role": "user", "content": {1, 2}}], "not text"),
    ],
)
def test_what_is_no_conversation(messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        canonical(messages, "here")


def test_a_template_that_refuses_is_quoted(tokenizer: Any) -> None:
    tokenizer.chat_template = STRICT
    with pytest.raises(DataError, match=r"cannot render[\s\S]*chat.jsonl#3[\s\S]*begin with the user"):
        encode(tokenizer, canonical(turns("x", first="assistant"), ""), "chat.jsonl#3")
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(DataError, match=r"before an answer[\s\S]*generation"):
        encode(tokenizer, canonical(turns("a", "b"), ""), "here")


@pytest.fixture
def conversations(tmp_path: Path) -> list[list[dict[str, str]]]:
    """Ten conversations, as ``chat.jsonl`` and as ``chat.parquet``."""
    from pyarrow import parquet, table

    made = [turns(f"question {i}", f"answer {i}", "more", f"again {i}") for i in range(10)]
    lines = [json.dumps({"messages": [dict(reversed(turn.items())) for turn in messages]}) for messages in made]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    optional = [[{**turn, "name": None} for turn in messages] for messages in made]
    parquet.write_table(table({"messages": optional}), tmp_path / "chat.parquet", row_group_size=4)
    return made


def chat_config(path: Path, **settings: Any) -> DataConfig:
    return DataConfig(train=[str(path)], chat="messages", sequence_length=32, validation_share=0, **settings)


def predicted(tokenizer: Any, batch: Batch) -> list[str]:
    return [
        tokenizer.decode(row[1:][mask])
        for row, mask in zip(batch.input_ids, batch.predicted, strict=True)
        if mask.any()
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("folder", [True, False])
def test_one_conversation_a_window(
    tmp_path: Path, conversations: list[Any], chat_tokenizer: Any, suffix: str, folder: bool
) -> None:
    config = replace(chat_config(tmp_path / f"chat.{suffix}", pack=False), sequence_length=200)
    where = tmp_path / "tokens" if folder else None
    windows = load_corpus(config, chat_tokenizer, vocabulary=257, folder=where).train
    assert len(windows) == 10
    batch = windows.take(range(10))
    assert batch.attention_mask is not None
    expected = [f"answer {i}<|end|>\nagain {i}<|end|>\n" for i in range(10)]
    assert sorted(predicted(chat_tokenizer, batch)) == expected


@pytest.mark.parametrize("folder", [True, False])
def test_packed_conversations_keep_what_is_predicted(
    tmp_path: Path, conversations: list[Any], chat_tokenizer: Any, folder: bool
) -> None:
    where = tmp_path / "tokens" if folder else None
    windows = load_corpus(chat_config(tmp_path / "chat.jsonl"), chat_tokenizer, vocabulary=257, folder=where).train
    batch = windows.take(range(len(windows)))
    assert batch.attention_mask is None and batch.loss_mask is not None
    text = chat_tokenizer.decode(batch.input_ids[batch.loss_mask])
    whole = "".join(sorted(f"answer {i}<|end|>\nagain {i}<|end|>\n" for i in range(10)))
    assert 0.8 * len(whole) < len(text) <= len(whole)
    assert "question" not in text and "more" not in text
    step = training_batch(windows, 1, 4, 0)
    assert step.loss_mask is not None
    assert 0 < int(step.predicted.sum()) < step.tokens


def test_text_beside_conversations_is_predicted_whole(
    tmp_path: Path, conversations: list[Any], chat_tokenizer: Any
) -> None:
    (tmp_path / "text.txt").write_text("plain text")
    (tmp_path / "chat.parquet").unlink()
    config = chat_config(tmp_path, pack=False)
    windows = load_corpus(config, chat_tokenizer).train
    assert len(windows) == 11
    assert "lain text<|endoftext|>" in predicted(chat_tokenizer, windows.take(range(11)))


def test_a_conversation_is_never_cut_and_held_out_once(tmp_path: Path, conversations: list[Any]) -> None:
    config = replace(chat_config(tmp_path), validation_share=0.3)  # both files: each conversation is there twice
    found = list(split_documents(config))
    assert all(side.document.chat for side in found)
    held_out = {side.document.text for side in found if side.held_out}
    train = {side.document.text for side in found if not side.held_out}
    assert not held_out & train
    assert (len(held_out), len(train), len(found)) == (3, 7, 20)
    assert [json.loads(text) for text in sorted(held_out | train)] == conversations


def test_a_tokenizer_without_a_template(tmp_path: Path, conversations: list[Any], tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"no chat template[\s\S]*chat_template.jinja"):
        load_corpus(chat_config(tmp_path / "chat.jsonl"), tokenizer)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_field_that_is_not_there(tmp_path: Path, conversations: list[Any], chat_tokenizer: Any, suffix: str) -> None:
    config = replace(chat_config(tmp_path / f"chat.{suffix}"), chat="conversation")
    with pytest.raises(DataError, match=r"no field 'conversation'[\s\S]*fields messages[\s\S]*data.chat=NAME"):
        load_corpus(config, chat_tokenizer)


def test_a_dataset_of_conversations(tmp_path: Path, conversations: list[Any]) -> None:
    (tmp_path / "chat.parquet").unlink()
    found = list(hub.documents(str(tmp_path), chat_config(tmp_path), "train"))
    assert all(document.chat for document in found)
    assert [json.loads(text) for text in sorted(document.text for document in found)] == conversations
    with pytest.raises(DataError, match=r"no field 'talk'[\s\S]*fields messages"):
        list(hub.documents(str(tmp_path), replace(chat_config(tmp_path), chat="talk"), "train"))


def test_unanswered_conversations_are_counted(tmp_path: Path, chat_tokenizer: Any) -> None:
    records = [turns("only a question"), turns("question", "answer " * 20)]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in records))
    said: list[str] = []
    load_corpus(chat_config(tmp_path / "chat.jsonl"), chat_tokenizer, say=said.append)
    assert said == ["data: 1 conversations left out, the assistant says nothing in them"]


def test_the_digest_tells_conversations_from_text(tmp_path: Path, conversations: list[Any]) -> None:
    config = chat_config(tmp_path / "chat.jsonl")
    assert digest(config) != digest(replace(config, chat=None)) != digest(replace(config, chat="other"))
