"""Mixtures keep their shares anywhere, use each window of a source once an epoch, and follow from the step alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaconv.config import DataConfig, RunConfig
from dynaconv.data.corpus import load_corpus
from dynaconv.data.mixture import MixedWindows, turn_at
from dynaconv.data.windows import PaddedWindows, Windows, evaluation_batches, training_batch
from dynaconv.errors import DataError
from dynaconv.rules import problems

LENGTH = 8
WEIGHTS = st.lists(st.floats(0.001, 1000), min_size=1, max_size=5).map(lambda ws: [w / sum(ws) for w in ws])


def source(index: int, windows: int) -> Windows:
    """Tokens that say which source they are of and where they stand."""
    return Windows(torch.arange(windows * LENGTH, dtype=torch.int32) + index * 10_000, LENGTH)


@given(weights=WEIGHTS, seed=st.integers(0, 9), start=st.integers(0, 500))
@settings(max_examples=60)
def test_every_turn_of_every_source_comes_once_in_order_and_in_its_share(
    weights: list[float], seed: int, start: int
) -> None:
    turns = [turn_at(place, weights, seed) for place in range(300)]
    for k, weight in enumerate(weights):
        own = [place for place, (owner, _) in enumerate(turns) if owner == k]
        assert [turns[place][1] for place in own] == list(range(len(own)))
        for count in (1, 10, 100, 300):
            given_so_far = sum(place < count for place in own)
            assert abs(given_so_far - count * weight) <= len(weights)
    far = [turn_at(10**9 + start + place, weights, seed) for place in range(50)]
    assert len(set(far)) == 50
    for k in range(len(weights)):
        own_turns = [turn for owner, turn in far if owner == k]
        assert own_turns == list(range(own_turns[0], own_turns[0] + len(own_turns))) if own_turns else True


@given(sizes=st.lists(st.integers(1, 12), min_size=2, max_size=4), batch_size=st.integers(1, 7), seed=st.integers(0, 5))
@settings(max_examples=30)
def test_a_sources_epoch_has_each_of_its_windows_once(sizes: list[int], batch_size: int, seed: int) -> None:
    mixed = MixedWindows([source(k, n) for k, n in enumerate(sizes)], [1 / len(sizes)] * len(sizes))
    steps = -(-2 * (max(sizes) + 1) * len(sizes) // batch_size)
    rows = torch.cat([training_batch(mixed, step, batch_size, seed).input_ids for step in range(steps)])
    for k, count in enumerate(sizes):
        own = rows[rows[:, 0] // 10_000 == k]
        assert len(own) >= 2 * count
        for epoch in range(2):
            assert len(own[epoch * count : (epoch + 1) * count].unique()) == count * LENGTH
    fresh = MixedWindows([source(k, n) for k, n in enumerate(sizes)], [1 / len(sizes)] * len(sizes))
    last = training_batch(fresh, steps - 1, batch_size, seed).input_ids
    assert torch.equal(last, rows[(steps - 1) * batch_size :])


def test_the_seed_draws_the_interleaving() -> None:
    orders = {tuple(turn_at(place, [0.5, 0.3, 0.2], seed)[0] for place in range(50)) for seed in range(4)}
    assert len(orders) == 4


def test_as_a_whole_it_is_all_windows_once() -> None:
    mixed = MixedWindows([source(0, 3), source(1, 5)], [0.9, 0.1])
    assert (len(mixed), mixed.total_tokens) == (8, 8 * LENGTH)
    rows = torch.cat([batch.input_ids for batch in evaluation_batches(mixed, 3)])
    expected = torch.cat([source(0, 3).take(range(3)).input_ids, source(1, 5).take(range(5)).input_ids])
    assert sorted(rows.tolist()) == sorted(expected.tolist())
    assert torch.equal(mixed.take([7, 0, 3]).input_ids, expected[[7, 0, 3]])


def test_masks_of_one_source_do_not_fall_on_another() -> None:
    padded = PaddedWindows(
        torch.arange(3, dtype=torch.int32), torch.tensor([3]), LENGTH, 9, torch.tensor([0, 1, 1]) > 0
    )
    batch = MixedWindows([source(1, 1), padded], [0.5, 0.5]).take([1, 0, 1])
    assert batch.attention_mask is not None
    assert batch.attention_mask.sum(1).tolist() == [3, LENGTH, 3]
    assert batch.predicted.sum(1).tolist() == [2, LENGTH - 1, 2]
    assert batch.input_ids[1, 0] == 10_000


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "a.txt").write_text("a" * 20_000)
    (tmp_path / "b.txt").write_text("b" * 2_000)
    return [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]


def test_weights_are_shares_of_tokens_and_short_text_begins_again(files: list[str], tokenizer: Any) -> None:
    config = DataConfig(train=files, weights=[1, 3], sequence_length=64, validation_share=0)
    said: list[str] = []
    windows = load_corpus(config, tokenizer, train_tokens=6400, accept_less=True, say=said.append).train
    assert len(windows) < 100
    assert said == [f"data: 4800 training tokens of {files[1]} asked for, making do with 2001"]
    letters = tokenizer.convert_tokens_to_ids(["a", "b"])
    rows = torch.cat([training_batch(windows, step, 8, 0).input_ids for step in range(25)])
    counts = [int((rows == letter).sum()) for letter in letters]
    assert counts[0] / sum(counts) == pytest.approx(0.25, abs=0.01)
    with pytest.raises(DataError, match=r"not enough training text[\s\S]*b.txt[\s\S]*4800 tokens"):
        load_corpus(config, tokenizer, train_tokens=6400)


def test_every_weighted_source_has_text_held_out(tmp_path: Path, tokenizer: Any) -> None:
    for letter in "ab":
        (tmp_path / letter).write_text("<|endoftext|>".join(letter * n for n in range(10, 210)))
    config = DataConfig(
        train=[str(tmp_path / "a"), str(tmp_path / "b")], weights=[3, 1], sequence_length=16, validation_share=0.2
    )
    corpus = load_corpus(config, tokenizer, train_tokens=1600, validation_tokens=1600)
    letters = tokenizer.convert_tokens_to_ids(["a", "b"])
    for windows in (corpus.train, corpus.validation):
        rows = torch.cat([batch.input_ids for batch in evaluation_batches(windows, 8)])
        counts = [int((rows == letter).sum()) for letter in letters]
        assert counts[0] / sum(counts) == pytest.approx(0.75, abs=0.02)


def test_text_of_its_own_is_held_out_of_every_source(files: list[str], tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "c.txt").write_text("c" * 200)
    config = DataConfig(train=files, weights=[1, 1], validation=[str(tmp_path / "c.txt")], sequence_length=16)
    corpus = load_corpus(config, tokenizer, train_tokens=64, validation_tokens=64)
    c = tokenizer.convert_tokens_to_ids("c")
    assert set(corpus.validation.take(range(4)).input_ids.flatten().tolist()) == {c}
    assert c not in training_batch(corpus.train, 0, 8, 0).input_ids


def test_text_that_is_all_held_out_cannot_be_mixed_in(files: list[str], tokenizer: Any) -> None:
    config = DataConfig(train=files, weights=[1, 1], validation=[files[1]], sequence_length=16)
    with pytest.raises(DataError, match=r"no training text[\s\S]*b\.txt"):
        load_corpus(config, tokenizer, accept_less=True)


def test_weights_that_do_not_fit(files: list[str], tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"weights do not fit[\s\S]*2 numbers[\s\S]*found: 1"):
        load_corpus(DataConfig(train=files, weights=[1]), tokenizer)
    found = problems(RunConfig(data=DataConfig(train=files, weights=[1])))
    assert found == ["data.weights has 1 numbers; it must have one for each of data.train (2)"]
    for wrong in ([0.0, 1.0], [-1.0, 1.0], [], [float("nan"), 1.0]):
        assert "data.weights" in problems(RunConfig(data=DataConfig(train=files, weights=wrong)))[0]
    assert problems(RunConfig(data=DataConfig(train=files, weights=[1, 2.5]))) == []
