"""One layer in memory at a time computes what the stock model computes, for every family, padded or not."""

from pathlib import Path

import pytest
import torch
from tiny_families import FAMILIES
from transformers import AutoModelForCausalLM

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.data.windows import Batch
from dynaconv.errors import CheckpointError
from dynaconv.profile import streaming
from dynaconv.profile.streaming import LayerStream, quick_dtype

CPU = torch.device("cpu")
VARIANTS = [
    *((family, {"tied": tied}) for family in FAMILIES for tied in (False, True)),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {"sliding_window": 7}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("qwen3", {"head_dim": 24, "kv_heads": 1}),
]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def batches(seed: int = 1) -> list[Batch]:
    """Two shapes, and padding on the right and on the left."""
    torch.manual_seed(seed)
    ids = [torch.randint(0, 257, shape) for shape in ((3, 20), (3, 20), (2, 11), (3, 20))]
    right = torch.arange(20) < torch.tensor([20, 9, 2])[:, None]
    left = torch.arange(11) >= torch.tensor([0, 6])[:, None]
    return [Batch(ids[0]), Batch(ids[1], right), Batch(ids[2], left), Batch(ids[3])]


def streamed(stream: LayerStream, text: list[Batch]) -> list[list[torch.Tensor]]:
    """Hidden states before and behind every layer, for each batch."""
    hidden = stream.embed(text)
    states = [[h] for h in hidden]
    for index in range(stream.checkpoint.layers):
        with stream.layer(index) as layer:
            for trail, batch in zip(states, text, strict=True):
                trail.append(stream.advance(index, layer, trail[-1], batch))
    return states


def logits_of(stream: LayerStream, hidden: torch.Tensor) -> torch.Tensor:
    """All pieces side by side."""
    starts, pieces = zip(*stream.logits_pieces(hidden), strict=True)
    assert list(starts) == list(range(0, stream.checkpoint.sizes["vocab"], streaming.PIECE))
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize(("family", "settings"), VARIANTS, ids=lambda value: str(value).strip("{}").replace("'", ""))
def test_streaming_equals_the_stock_model(family: str, settings, tiny_checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(streaming, "PIECE", 100)  # three pieces of the vocabulary, the last one smaller
    monkeypatch.setattr(streaming, "HEAD_BYTES", 4 * 100 * 7)  # seven tokens at a time
    monkeypatch.setattr(streaming, "READ_BYTES", 4 * 64 * 20)  # twenty rows of the embedding
    folder = tiny_checkpoint(family, layers=3, **settings)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = batches()
    stream = LayerStream(Checkpoint.open(folder), CPU)
    states = streamed(stream, text)
    total, count = 0.0, 0
    with torch.no_grad():
        for batch, trail in zip(text, states, strict=True):
            mask = batch.attention_mask
            output = stock(
                input_ids=batch.input_ids,
                attention_mask=None if mask is None else mask.long(),
                use_cache=False,
                output_hidden_states=True,
            )
            real = torch.ones_like(batch.input_ids, dtype=torch.bool) if mask is None else mask
            for own, other in zip(trail[:-1], output.hidden_states[:-1], strict=True):  # the last one is normalised
                torch.testing.assert_close(own[real], other[real], **TOLERANCE)
            torch.testing.assert_close(logits_of(stream, trail[-1][real]), output.logits[real], **TOLERANCE)
            known = batch.predicted
            nats = torch.nn.functional.cross_entropy(
                output.logits[:, :-1][known], batch.input_ids[:, 1:][known], reduction="sum"
            )
            total, count = total + float(nats), count + int(known.sum())
    assert stream.loss([trail[-1] for trail in states], text) == pytest.approx(total / count, rel=1e-5)


def test_only_rows_of_tokens_that_occur_are_read(tiny_checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(streaming, "READ_BYTES", 1)  # one row at a time
    stream = LayerStream(Checkpoint.open(tiny_checkpoint(tied=True)), CPU)
    read: list[tuple[int, int]] = []
    reader = stream.checkpoint.reader
    original = reader.read_finite
    monkeypatch.setattr(reader, "read_finite", lambda name, rows=None: read.append(rows) or original(name, rows))
    hidden = stream.embed([Batch(torch.tensor([[5, 256, 7], [7, 5, 5]])), Batch(torch.tensor([[9]]))])
    assert read == [(5, 6), (7, 8), (9, 10), (256, 257)]
    table = reader.read("model.embed_tokens.weight")
    assert torch.equal(hidden[0], table[torch.tensor([[5, 256, 7], [7, 5, 5]])])
    assert torch.equal(hidden[1], table[[9]][None])


def test_a_stub_answers_for_its_layer() -> None:
    layer = torch.nn.Linear(2, 2)
    layer.attention_type = "sliding_attention"
    stub = streaming.Stub(layer)
    assert stub.attention_type == "sliding_attention"
    assert not list(stub.parameters())
    with pytest.raises(AttributeError):
        stub.no_such_thing  # noqa: B018


def test_loss_is_the_stock_models_on_whole_windows(tiny_checkpoint) -> None:
    folder = tiny_checkpoint()
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    text = [batches()[0]]
    stream = LayerStream(Checkpoint.open(folder), CPU)
    with torch.no_grad():
        expected = stock(input_ids=text[0].input_ids, labels=text[0].labels).loss
    assert stream.loss([streamed(stream, text)[0][-1]], text) == pytest.approx(float(expected), rel=1e-5)


def resident(stream: LayerStream) -> set[str]:
    model = stream._model
    layers = {f"layer {i}": layer for i, layer in enumerate(stream._layers)}
    parts = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings(), **layers}
    return {name for name, part in parts.items() if any(not p.is_meta for p in part.parameters())}


def test_only_one_layer_is_resident(tiny_checkpoint) -> None:
    stream = LayerStream(Checkpoint.open(tiny_checkpoint(layers=3)), CPU)
    text = batches()
    assert resident(stream) == set()
    hidden = stream.embed(text)
    assert resident(stream) == set()
    with stream.layer(1) as layer:
        stream.advance(1, layer, hidden[0], text[0])
        assert resident(stream) == {"layer 1"}
    for _ in stream.logits_pieces(hidden[0][0]):
        assert resident(stream) == {"head"}
    assert resident(stream) == set()


def test_bf16_is_computed_in_float32_on_the_cpu(tiny_checkpoint) -> None:
    folder = tiny_checkpoint("qwen3", dtype=torch.bfloat16)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.dtype == torch.bfloat16
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = [batches()[0]]
    stream = LayerStream(checkpoint, CPU)
    found = logits_of(stream, streamed(stream, text)[0][-1].flatten(0, 1))
    with torch.no_grad():
        torch.testing.assert_close(found, stock(text[0].input_ids).logits.flatten(0, 1), **TOLERANCE)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"]
)
def test_nan_names_the_weight(name: str, tiny_checkpoint) -> None:
    from safetensors.torch import load_file, save_file

    folder: Path = tiny_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        stream = LayerStream(Checkpoint.open(folder), CPU)
        text = [Batch(torch.arange(20)[None])]  # token 0 too: other rows of the embedding are not read
        stream.loss([trail[-1] for trail in streamed(stream, text)], text)


def test_measurements_are_quick_where_the_cpu_multiplies_bf16(tiny_checkpoint, monkeypatch) -> None:
    half, single = (Checkpoint.open(tiny_checkpoint(dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    for known in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda known=known: known)
        assert quick_dtype(half, CPU) == (torch.bfloat16 if known else torch.float32)
        assert quick_dtype(single, CPU) == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_computed_in_bf16_the_loss_is_nearly_the_same(family: str, tiny_checkpoint) -> None:
    checkpoint, text = Checkpoint.open(tiny_checkpoint(family, dtype=torch.bfloat16)), batches()
    exact, quick = (LayerStream(checkpoint, CPU, dtype=dtype) for dtype in (None, torch.bfloat16))
    losses = [stream.loss([trail[-1] for trail in streamed(stream, text)], text) for stream in (exact, quick)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
