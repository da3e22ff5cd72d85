"""What the loss feels equals autograd by hand on the stock model."""

import pytest
import torch
from tiny_families import FAMILIES
from transformers import AutoModelForCausalLM

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.data.windows import Batch
from dynaconv.errors import CheckpointError
from dynaconv.profile import loss_aware
from dynaconv.profile.loss_aware import loss_weights, whole_model
from dynaconv.profile.measure import Sample
from dynaconv.profile.streaming import LayerStream

CPU = torch.device("cpu")


def nudged(down: torch.nn.Module, width: int, seen: dict[str, torch.Tensor]) -> None:
    """Adds a zero to what ``down`` gives, that a gradient can be taken of: dLoss/dzero is dLoss/dy."""

    def add(module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        own = output if module.bias is None else output - module.bias
        seen["size"] = own.detach().norm(dim=-1)
        seen["zero"] = torch.zeros(*output.shape[:-1], width, requires_grad=True)
        return output + seen["zero"]

    down.register_forward_hook(add)


def by_hand(folder, batch: Batch) -> torch.Tensor:
    """(L, B, T), the summed loss of each window on its own."""
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    spec, shape = Checkpoint.open(folder).family.ffn, batch.input_ids.shape
    seen: list[dict[str, torch.Tensor]] = [{} for _ in range(stock.config.num_hidden_layers)]
    for i, layer in enumerate(seen):
        nudged(stock.get_submodule(f"{spec.path.format(layer=i)}.{spec.down}"), stock.config.hidden_size, layer)
    output = stock(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    count = (batch.labels[:, 1:] != -100).sum()
    (output.loss * count).backward()
    return torch.stack([(layer["zero"].grad.norm(dim=-1) * layer["size"]).view(shape) for layer in seen])


VARIANTS = [*((family, {}) for family in FAMILIES), ("llama", {"mlp_bias": True}), ("qwen2", {"tied": True})]


@pytest.mark.parametrize(("family", "settings"), VARIANTS)
@pytest.mark.parametrize("tokens", [1024, 30])
def test_weights_equal_autograd_by_hand(family, settings, tokens, tiny_checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(loss_aware, "TOKENS", tokens)
    folder = tiny_checkpoint(family, layers=3, **settings)
    torch.manual_seed(2)
    ids = torch.randint(0, 257, (4, 15))
    right = torch.arange(15) < torch.tensor([15, 6, 15, 3])[:, None]
    text = [Batch(ids, right), Batch(ids.flip(0), None, (torch.arange(15) % 5 > 1).expand(4, 15))]  # and a conversation
    sample = Sample.of(text, 0.75)  # the second batch counts in part
    stream = LayerStream(Checkpoint.open(folder), CPU)
    seen: list[int] = []
    found = loss_weights(stream, sample, finished=lambda batch, tokens: seen.append(tokens))
    expected = torch.cat(
        [by_hand(folder, batch)[:, mask] for batch, mask in zip(text, sample.curve_masks, strict=True)], dim=1
    )
    assert found.shape == (3, sample.curve_tokens)
    assert float(found.mean()) == pytest.approx(1.0)
    torch.testing.assert_close(found, expected / expected.mean(), rtol=1e-4, atol=1e-5)
    assert sum(seen) == sample.curve_tokens


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_model_is_the_stock_model(family: str, tied: bool, tiny_checkpoint) -> None:
    folder = tiny_checkpoint(family, tied=tied)
    model = whole_model(Checkpoint.open(folder), torch.float32, CPU)
    assert not any(p.is_meta or p.requires_grad for p in model.parameters())
    ids = torch.randint(0, 257, (2, 9))
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock(ids).logits)


def test_nan_names_the_weight_here_too(tiny_checkpoint) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][1, 1] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight"):
        whole_model(Checkpoint.open(folder), torch.float32, CPU)
