"""Text to tokens: deterministic, no more than asked for, and every shortage says how much there is."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dynaconv.config import DataConfig
from dynaconv.data.corpus import digest, load_corpus
from dynaconv.data.split import split_documents
from dynaconv.data.tokenizer import load_tokenizer
from dynaconv.data.windows import PaddedWindows
from dynaconv.errors import CheckpointError, DataError

END = 0  # <|endoftext|> of the fixture's tokenizer


@pytest.fixture
def config(text_file: Path) -> DataConfig:
    return DataConfig(train=[str(text_file)], sequence_length=64)


def test_all_tokens_are_the_documents_joined_by_the_end_of_text(config: DataConfig, tokenizer: Any) -> None:
    corpus = load_corpus(config, tokenizer)
    for held_out, windows in ((False, corpus.train), (True, corpus.validation)):
        expected = [d.text for held, d in split_documents(config) if held == held_out]
        assert windows.tokens.dtype == torch.int32
        assert tokenizer.decode(windows.tokens).split("<|endoftext|>") == [*expected, ""]


def test_less_is_a_prefix_and_the_other_side_does_not_move(config: DataConfig, tokenizer: Any) -> None:
    whole = load_corpus(config, tokenizer)
    part = load_corpus(config, tokenizer, train_tokens=1000, validation_tokens=100)
    assert (part.train.total_tokens, part.validation.total_tokens) == (1024, 128)  # whole windows
    assert torch.equal(part.train.tokens, whole.train.tokens[:1024])
    assert torch.equal(part.validation.tokens, whole.validation.tokens[:128])
    assert part.digest == whole.digest == digest(config)


def test_nothing_is_read_for_a_side_that_is_not_wanted(config: DataConfig, tokenizer: Any) -> None:
    corpus = load_corpus(config, tokenizer, train_tokens=64, validation_tokens=0)
    assert (len(corpus.train), len(corpus.validation)) == (1, 0)


def test_tokenising_stops_when_there_is_enough(tokenizer: Any) -> None:
    seen = []

    def counting(batch: list[str], **kwargs: Any) -> Any:
        seen.extend(batch)
        return tokenizer(batch, **kwargs)

    counting.eos_token_id = END  # type: ignore[attr-defined]
    load_corpus(DataConfig(), counting, train_tokens=1000, validation_tokens=0)
    assert 1000 < sum(map(len, seen)) < 1_000_000


def test_unpacked_documents_are_windows_of_their_own(tmp_path: Path, tokenizer: Any) -> None:
    texts = ["a" * n for n in (3, 8, 20)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = DataConfig(train=[str(tmp_path)], sequence_length=8, pack=False, validation_share=0)
    corpus = load_corpus(config, tokenizer)
    assert isinstance(corpus.train, PaddedWindows)
    batch = corpus.train.take(range(3))
    assert batch.attention_mask is not None
    assert sorted(batch.attention_mask.sum(1).tolist()) == [4, 8, 8]  # three letters and the end of text
    assert corpus.train.total_tokens == batch.tokens == 20
    assert len(load_corpus(config, tokenizer, train_tokens=8).train) < 3


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            {"train_tokens": 10**6, "validation_tokens": 0},
            r"not enough training text[\s\S]*1000000[\s\S]*finetune.tokens",
        ),
        ({"train_tokens": 64, "validation_tokens": 10**5}, r"not enough validation text[\s\S]*data.validation_share"),
    ],
)
def test_less_text_than_asked_for(config: DataConfig, tokenizer: Any, wanted: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_corpus(config, tokenizer, **wanted)
    said: list[str] = []
    corpus = load_corpus(config, tokenizer, **wanted, accept_less=True, say=said.append)
    assert len(corpus.train) > 0
    assert len(said) == 1
    assert "making do with" in said[0]


def test_too_little_for_one_window(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(DataError, match=r"not enough training text[\s\S]*64 tokens, one window[\s\S]*6 tokens"):
        load_corpus(DataConfig(train=[str(tmp_path)], sequence_length=64), tokenizer, accept_less=True)
    (tmp_path / "short.txt").write_text(" \n")
    with pytest.raises(DataError, match="no training text"):
        load_corpus(DataConfig(train=[str(tmp_path)], sequence_length=64), tokenizer)


@pytest.mark.parametrize("chat", [None, "messages"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_an_empty_split(tmp_path: Path, tokenizer: Any, suffix: str, chat: str | None) -> None:
    from pyarrow import parquet, schema, string, table

    path = tmp_path / f"empty.{suffix}"
    path.write_text("")
    if suffix == "parquet":
        parquet.write_table(table({chat or "text": []}, schema([(chat or "text", string())])), path)
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(DataError, match=rf"no training text[\s\S]*{path}[\s\S]*found: 0 tokens"):
        load_corpus(DataConfig(train=[str(path)], chat=chat, validation_share=0), tokenizer, folder=tmp_path / "tokens")


def test_sequences_beyond_the_models_positions(config: DataConfig, tokenizer: Any) -> None:
    load_corpus(config, tokenizer, max_positions=64)
    with pytest.raises(DataError, match=r"2 to 63 tokens[\s\S]*found: 64"):
        load_corpus(config, tokenizer, max_positions=63)


def test_a_tokenizer_of_another_model(config: DataConfig, tokenizer: Any) -> None:
    load_corpus(config, tokenizer, vocabulary=257)
    with pytest.raises(DataError, match=r"not this model's[\s\S]*below 50"):
        load_corpus(config, tokenizer, vocabulary=50)


def test_no_warning_about_long_sequences(config: DataConfig, tokenizer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer.model_max_length = 16
    load_corpus(config, tokenizer, train_tokens=1000)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_what_was_left_out_is_said_once(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("a" * 1000)
    for name in "bcdef":
        (tmp_path / f"{name}.txt").write_bytes(b"\xff\xfe\0")
    said: list[str] = []
    load_corpus(DataConfig(train=[str(tmp_path)], validation_share=0), tokenizer, say=said.append)
    assert len(said) == 1
    assert "5 files left out" in said[0]


def test_digest_follows_content_not_place(tmp_path: Path, text_file: Path) -> None:
    def of(**changes: Any) -> str:
        return digest(dataclasses.replace(DataConfig(train=[str(tmp_path / "a")]), **changes))

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("x")
    first = of()
    assert first == of(sequence_length=8)
    assert len({first, of(validation_share=0.1), of(validation=[str(text_file)]), of(field="x")}) == 4
    (tmp_path / "a").rename(tmp_path / "b")
    assert of(train=[str(tmp_path / "b")]) == first
    (tmp_path / "b" / "x.txt").write_text("y")
    assert of(train=[str(tmp_path / "b")]) != first
    assert of(train=["owner/name"]) != of(train=["owner/name"], dataset_config="c")


def test_digest_needs_no_torch() -> None:
    code = "import sys, dynaconv.data.digest as d; d.digest(d.DataConfig()); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_same_arguments_give_the_same_tokens(config: DataConfig, tokenizer: Any) -> None:
    first, second = load_corpus(config, tokenizer), load_corpus(config, tokenizer)
    assert torch.equal(first.train.tokens, second.train.tokens)
    assert torch.equal(first.validation.tokens, second.validation.tokens)


def test_loading_a_tokenizer(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_checkpoint()
    assert load_tokenizer(folder).eos_token_id == END
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_tokenizer(folder)
