"""Tokens on disk are those in memory, whatever interrupted the writing, and are made once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dynaconv.config import DataConfig
from dynaconv.data import filling, store
from dynaconv.data.corpus import Corpus, load_corpus
from dynaconv.data.windows import Windows, training_batch
from dynaconv.errors import ArtifactError


class Counting:
    """A tokenizer that counts the characters it was given and may break off."""

    def __init__(self, tokenizer: Any, break_after: int = 10**9) -> None:
        self.tokenizer, self.break_after, self.characters = tokenizer, break_after, 0

    def __call__(self, texts: list[str], **settings: Any) -> Any:
        if self.characters >= self.break_after:
            raise KeyboardInterrupt
        self.characters += sum(map(len, texts))
        return self.tokenizer(texts, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(filling, "BATCH", 4000)
    monkeypatch.setattr(store, "COMMIT", 6000)
    return


@pytest.fixture
def config(text_file: Path) -> DataConfig:
    return DataConfig(train=[str(text_file)], sequence_length=64)


@pytest.fixture
def load(config: DataConfig, tokenizer: Any, tmp_path: Path) -> Callable[..., Corpus]:
    def load(folder: bool = True, tokenizer: Any = tokenizer, config: DataConfig = config, **wanted: Any) -> Corpus:
        wanted = {"validation_tokens": 0, "vocabulary": 257, "workers": 1, **wanted}
        return load_corpus(config, tokenizer, folder=tmp_path / "tokens" if folder else None, **wanted)

    return load


def same(one: Windows, other: Windows) -> bool:
    batches = [[training_batch(windows, step, 8, 3) for step in range(20)] for windows in (one, other)]
    return len(one) == len(other) and all(
        torch.equal(a.input_ids, b.input_ids) and torch.equal(a.predicted, b.predicted)
        for a, b in zip(*batches, strict=True)
    )


@pytest.mark.parametrize(("pack", "wanted"), [(True, None), (True, 30_000), (False, None), (False, 3000)])
def test_disk_holds_what_memory_does(
    load: Callable[..., Corpus], config: DataConfig, tmp_path: Path, pack: bool, wanted: int | None
) -> None:
    config = replace(config, pack=pack)
    on_disk = load(config=config, train_tokens=wanted, validation_tokens=200)
    in_memory = load(False, config=config, train_tokens=wanted, validation_tokens=200)
    assert same(on_disk.train, in_memory.train)
    assert same(on_disk.validation, in_memory.validation)
    assert on_disk.train.tokens.dtype == torch.uint16
    count = json.loads((tmp_path / "tokens" / "train-0.json").read_text())["tokens"]
    assert (tmp_path / "tokens" / "train-0.tokens").stat().st_size == 2 * count


def test_a_large_vocabulary_takes_32_bits(load: Callable[..., Corpus]) -> None:
    assert load(vocabulary=70_000).train.tokens.dtype == torch.int32
    assert load(vocabulary=None).train.tokens.dtype == torch.int32


@pytest.mark.parametrize("break_after", [3000, 20_000, 100_000])
def test_an_interruption_costs_no_more_than_what_was_not_flushed(
    load: Callable[..., Corpus], tokenizer: Any, tmp_path: Path, break_after: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        load(tokenizer=Counting(tokenizer, break_after))
    for path in (tmp_path / "tokens").glob("train-0.*"):
        if path.suffix not in (".json", ".lock"):
            path.open("ab").write(b"half a token")  # written, never recorded
    rest, whole = Counting(tokenizer), Counting(tokenizer)
    resumed = load(tokenizer=rest).train
    assert same(resumed, load(False, tokenizer=whole).train)
    assert rest.characters <= whole.characters - break_after + 2 * (6000 + 3 * 4000)
    if break_after > 50_000:
        assert rest.characters < whole.characters


def test_nothing_is_tokenised_twice(load: Callable[..., Corpus], tokenizer: Any) -> None:
    first = load(train_tokens=30_000).train
    again = Counting(tokenizer)
    assert same(load(tokenizer=again, train_tokens=30_000).train, first)
    assert len(load(tokenizer=again, train_tokens=10_000).train) == -(-10_000 // 64)
    assert again.characters == 0
    more = load(tokenizer=again, train_tokens=60_000).train
    assert same(more, load(False, train_tokens=60_000).train)
    assert 0 < again.characters < 45_000
    everything = Counting(tokenizer)
    assert same(load(tokenizer=everything).train, load(False).train)
    before = everything.characters
    load(tokenizer=everything)
    assert everything.characters == before > 0


def test_tokens_of_something_else_are_replaced(
    load: Callable[..., Corpus], config: DataConfig, tokenizer: Any, tmp_path: Path
) -> None:
    load()
    other = tmp_path / "other.txt"
    other.write_text("something else\n" * 2000)
    changed = replace(config, train=[str(other)])
    assert same(load(config=changed).train, load(False, config=changed).train)
    tokenizer.add_tokens(["something else"])
    fewer = load(config=changed, vocabulary=258).train
    assert len(fewer) < len(load(False, config=config).train)
    assert same(fewer, load(False, config=changed, vocabulary=258).train)
    assert len(list((tmp_path / "tokens").iterdir())) == 3  # one set of files, however often it was replaced


def test_damaged_files_are_made_again(load: Callable[..., Corpus], tmp_path: Path) -> None:
    first = load(False).train
    load()
    (tmp_path / "tokens" / "train-0.tokens").write_bytes(b"")
    assert same(load().train, first)


def test_a_disk_that_is_too_small_is_refused_at_once(
    load: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("dynaconv.artifacts.files.free_bytes", lambda _: 1000)
    with pytest.raises(ArtifactError, match="the disk is full"):
        load(train_tokens=30_000)
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["train-0.lock"]


def test_weighted_sources_lie_beside_each_other(
    load: Callable[..., Corpus], config: DataConfig, tmp_path: Path, text_file: Path
) -> None:
    (tmp_path / "b.txt").write_text("b" * 9000)
    mixed = replace(config, train=[str(text_file), str(tmp_path / "b.txt")], weights=[0.8, 0.2])
    wanted = {"train_tokens": 20_000, "validation_tokens": 300}
    on_disk, in_memory = load(config=mixed, **wanted), load(False, config=mixed, **wanted)
    assert same(on_disk.train, in_memory.train)
    assert same(on_disk.validation, in_memory.validation)
    assert {path.stem for path in (tmp_path / "tokens").iterdir()} == {"train-0", "train-1"}


def test_ranks_that_ask_at_once_share_one_set_of_files(load: Callable[..., Corpus], tokenizer: Any) -> None:
    alone, together = Counting(tokenizer), Counting(tokenizer)
    expected = load(False, tokenizer=alone).train
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda _: load(tokenizer=together).train, range(3)))
    assert all(same(windows, expected) for windows in found)
    assert together.characters == alone.characters
