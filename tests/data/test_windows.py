"""Batches are a pure function of the step, use every window once an epoch, and mask what is padded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynaconv.data.windows import (
    IGNORED,
    Batch,
    PaddedWindows,
    Windows,
    evaluation_batches,
    scored_tokens,
    training_batch,
)
from dynaconv.ranks import Ranks

LENGTH = 8


def stream(tokens: int) -> Windows:
    """Token i at position i."""
    return Windows(torch.arange(tokens, dtype=torch.int32), LENGTH)


@given(tokens=st.integers(LENGTH, 200), batch_size=st.integers(1, 9), seed=st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_an_epoch_uses_every_window_once(tokens: int, batch_size: int, seed: int) -> None:
    windows = stream(tokens)
    steps = -(-3 * len(windows) // batch_size)
    rows = torch.cat([training_batch(windows, step, batch_size, seed).input_ids for step in range(steps)])
    assert torch.equal((rows[:, 1:] - rows[:, :-1]) % tokens, torch.ones(len(rows), LENGTH - 1, dtype=torch.int64))
    for epoch in range(3):
        seen = rows[epoch * len(windows) : (epoch + 1) * len(windows)].flatten()
        assert len(seen.unique()) == len(windows) * LENGTH
        if tokens % LENGTH == 0:
            assert sorted(seen.tolist()) == list(range(tokens))


def test_a_step_depends_on_nothing_but_itself() -> None:
    windows = stream(1000)
    alone = training_batch(windows, 37, 4, seed=1).input_ids
    for step in range(40):
        batch = training_batch(windows, step, 4, seed=1).input_ids
        assert torch.equal(batch, alone) == (step == 37)
    assert not torch.equal(training_batch(windows, 37, 4, seed=2).input_ids, alone)


def test_torchs_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(0)
    first = training_batch(stream(997), 5, 4, seed=9).input_ids
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(training_batch(stream(997), 5, 4, seed=9).input_ids, first)
    assert torch.equal(torch.get_rng_state(), before)


def test_epochs_differ_in_order_and_offset() -> None:
    windows = stream(80)
    starts = [training_batch(windows, epoch, 10, seed=0).input_ids[:, 0] for epoch in range(5)]
    assert len({tuple(s.tolist()) for s in starts}) == 5
    assert len({int(s[0]) % LENGTH for s in starts}) > 1


def test_evaluation_takes_each_window_once_from_a_fixed_choice() -> None:
    windows = stream(LENGTH * 20 + 3)
    rows = torch.cat([batch.input_ids for batch in evaluation_batches(windows, 3)])
    assert sorted(rows.flatten().tolist()) == list(range(LENGTH * 20))
    some = torch.cat([batch.input_ids for batch in evaluation_batches(windows, 7, limit_tokens=5 * LENGTH)])
    rest = torch.cat([batch.input_ids for batch in evaluation_batches(windows, 7, skip_tokens=5 * LENGTH)])
    assert torch.equal(some, rows[:5])
    assert torch.equal(rest, rows[5:])
    other = next(evaluation_batches(windows, 20, seed=1)).input_ids
    assert not torch.equal(other, rows)


def test_padding_is_masked_and_left_out_of_the_labels() -> None:
    lengths = torch.tensor([3, LENGTH, LENGTH])
    tokens = torch.cat([torch.arange(1, n + 1, dtype=torch.int32) for n in lengths])
    windows = PaddedWindows(tokens, lengths, LENGTH, padding=0)
    batch = windows.take([0, 1, 2])
    assert batch.attention_mask is not None
    assert batch.attention_mask.sum(1).tolist() == [3, LENGTH, LENGTH]
    assert batch.labels[0].tolist() == [1, 2, 3, *[IGNORED] * (LENGTH - 3)]
    assert torch.equal(batch.labels[1:], batch.input_ids[1:])
    assert batch.tokens == windows.total_tokens == 3 + 2 * LENGTH
    assert windows.take([1, 2]).attention_mask is None
    epoch = torch.cat([training_batch(windows, step, 1, seed=0).input_ids for step in range(3)])
    assert sorted(epoch.tolist()) == sorted(batch.input_ids.tolist())


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 9])
def test_micro_batches_cover_the_batch(parts: int) -> None:
    ids = torch.arange(5 * LENGTH).view(5, LENGTH)
    mask = torch.rand(5, LENGTH) > 0.3
    micro = Batch(ids, mask).split(parts)
    assert len(micro) == min(parts, 5)
    assert torch.equal(torch.cat([part.input_ids for part in micro]), ids)
    assert torch.equal(torch.cat([part.attention_mask for part in micro if part.attention_mask is not None]), mask)
    sizes = [len(part.input_ids) for part in micro]
    assert max(sizes) - min(sizes) <= 1


def test_what_is_not_to_be_predicted_is_left_out_of_loss_and_labels() -> None:
    scored = torch.tensor([False, False, True, True, False, True, True, True])
    batch = Windows(torch.arange(LENGTH, dtype=torch.int32), LENGTH, scored).take([0])
    assert batch.predicted.tolist() == [[False, True, True, False, True, True, True]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 2, 3, IGNORED, 5, 6, 7]]
    assert batch.tokens == LENGTH
    padded = PaddedWindows(torch.arange(3, dtype=torch.int32), torch.tensor([3]), LENGTH, 0, scored[:3]).take([0])
    assert padded.predicted.tolist() == [[False, True, *[False] * 5]]
    assert padded.labels.tolist() == [[IGNORED, IGNORED, 2, *[IGNORED] * 5]]
    assert batch.rows(0, 1).to("cpu").predicted.equal(batch.predicted)


def share_of(batch: Batch, rank: int, world: int) -> torch.Tensor:
    ranks = Ranks(rank, world, torch.device("cpu"))
    return batch.rows(*ranks.rows(len(batch.input_ids))).input_ids


@given(
    tokens=st.integers(LENGTH, 200),
    share=st.integers(1, 4),
    world=st.sampled_from([1, 2, 3, 4]),
    seed=st.integers(0, 5),
)
@settings(max_examples=40)
def test_ranks_see_every_window_once_an_epoch_and_resume_where_they_were(
    tokens: int, share: int, world: int, seed: int
) -> None:
    windows, size = stream(tokens), share * world
    steps = -(-2 * len(windows) // size)
    seen = [
        [share_of(training_batch(windows, step, size, seed), rank, world) for rank in range(world)]
        for step in range(steps)
    ]
    assert all(len(rows) == share for ranks in seen for rows in ranks)
    order = torch.cat([rows for ranks in seen for rows in ranks])
    for epoch in range(2):
        assert len(order[epoch * len(windows) : (epoch + 1) * len(windows)].unique()) == len(windows) * LENGTH
    again = stream(tokens)  # another process, begun at the last step
    resumed = [share_of(training_batch(again, steps - 1, size, seed), rank, world) for rank in range(world)]
    assert all(torch.equal(a, b) for a, b in zip(resumed, seen[-1], strict=True))
    alone = training_batch(again, steps - 1, size, seed).input_ids
    assert torch.equal(torch.cat(resumed), alone)


def test_scored_tokens_are_real_and_their_successors_are_to_be_predicted() -> None:
    ids = torch.arange(12).view(3, 4)
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]]).bool()
    answers = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0], [1, 1, 0, 1]]).bool()
    assert scored_tokens(Batch(ids)).int().tolist() == [[1, 1, 1, 0]] * 3
    assert scored_tokens(Batch(ids, real)).int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [0, 1, 1, 0]]
    assert scored_tokens(Batch(ids, None, answers)).int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 0], [1, 0, 1, 0]]
    batch = Batch(ids, real, answers & real)
    assert scored_tokens(batch).int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0]]
    for each in (Batch(ids), Batch(ids, real), batch):
        assert torch.equal(each.predicted, scored_tokens(each)[:, :-1])
        assert torch.equal(each.labels[:, 1:] != IGNORED, each.predicted), "what the model itself would score"
