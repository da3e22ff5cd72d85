"""Of a conversation profile measures what training and evaluation score: the assistant's answers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.data.windows import Batch
from dynaconv.evaluation.scoring import score
from dynaconv.kernels.partition import Partition
from dynaconv.profile.measure import Sample, measure_layer
from dynaconv.profile.streaming import LayerStream

CPU = torch.device("cpu")


def chat() -> list[Batch]:
    """Questions and answers in turn, padded on the right; only answers are to be predicted."""
    torch.manual_seed(4)
    ids, place = torch.randint(1, 257, (4, 18)), torch.arange(18)
    real = place < torch.tensor([18, 11, 15, 18])[:, None]
    answers = ((place // 4) % 2 == 1) & real
    return [Batch(ids[:2], real[:2], answers[:2]), Batch(ids[2:], real[2:], answers[2:])]


def profile(folder: Path, text: list[Batch]) -> tuple[float, Sample, list[dict[str, torch.Tensor]]]:
    stream, sample = LayerStream(Checkpoint.open(folder), CPU), Sample.of(text, 1.0)
    hidden, partition = stream.embed(text), Partition.equal(96, 16)
    measured = [
        measure_layer(stream, layer, hidden, sample, order="importance", partition=partition, experts="routed")
        for layer in range(stream.checkpoint.layers)
    ]
    return stream.loss(hidden, text), sample, measured


def test_the_loss_and_the_curves_are_those_of_the_answers(tiny_checkpoint: Callable[..., Path]) -> None:
    folder, text = tiny_checkpoint(), chat()
    loss, sample, measured = profile(folder, text)
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    evaluated = score(stock, text)
    with torch.no_grad():  # as transformers, or a training loop on labels, scores the batch
        outputs = [stock(b.input_ids, attention_mask=b.attention_mask.long(), labels=b.labels).loss for b in text]
    counts = [int(b.predicted.sum()) for b in text]
    trained = sum(float(out) * n for out, n in zip(outputs, counts, strict=True)) / sum(counts)
    assert loss == pytest.approx(evaluated.loss, rel=1e-5)
    assert loss == pytest.approx(trained, rel=1e-5)
    assert sample.curve_tokens == evaluated.tokens == sum(int(b.loss_mask.sum()) for b in text)
    for batch, mask in zip(text, sample.curve_masks, strict=True):
        assert torch.equal(mask[:, :-1], batch.predicted) and not bool(mask[:, -1].any())
    assert all(float(layer["feature_gram"][-1, -1]) == sample.curve_tokens for layer in measured)


def test_neurons_are_ordered_by_all_real_tokens(tiny_checkpoint: Callable[..., Path]) -> None:
    """At a low dial the questions run through the same blocks."""
    folder, text = tiny_checkpoint(), chat()
    loss, _, measured = profile(folder, text)
    plain_loss, _, plain = profile(folder, [Batch(batch.input_ids, batch.attention_mask) for batch in text])
    assert loss != pytest.approx(plain_loss, rel=1e-3)
    for one, other in zip(measured, plain, strict=True):
        assert torch.equal(one["activation"], other["activation"])
        assert torch.equal(one["order"], other["order"])
        assert not torch.equal(one["curve_mean"], other["curve_mean"])
