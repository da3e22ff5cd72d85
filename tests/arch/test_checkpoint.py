"""Opening a checkpoint: what it says of itself, and one clear message for everything that can be wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dynaconv.arch.checkpoint import Checkpoint, copy_side_files, side_files
from dynaconv.arch.registry import known_families
from dynaconv.arch.surgery import transform
from dynaconv.artifacts.tensors import read_tensors, write_tensors
from dynaconv.convert.compare import final_states
from dynaconv.data.windows import Batch
from dynaconv.errors import ArtifactError, CheckpointError, UnknownArchitectureError
from dynaconv.profile.streaming import LayerStream

Make = Callable[..., Path]


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_numbers_agree_with_the_model(tiny_checkpoint: Make, family: str, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint(family, tied=tied, head_dim=24 if family == "qwen3" else None, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder)
    checkpoint = Checkpoint.open(folder)
    layer = model.model.layers[1]
    assert checkpoint.parameters == model.num_parameters()
    assert checkpoint.ffn_parameters == sum(p.numel() for p in layer.mlp.parameters())
    norms = [p.numel() for name, p in layer.self_attn.named_parameters() if "norm" in name]
    assert checkpoint.attention_parameters == sum(p.numel() for p in layer.self_attn.parameters()) - sum(norms)
    assert checkpoint.embedding_parameters == model.get_input_embeddings().weight.numel()
    assert checkpoint.head_parameters == model.get_output_embeddings().weight.numel()
    assert checkpoint.dtype == torch.bfloat16
    assert (checkpoint.layers, checkpoint.tied, checkpoint.max_positions) == (2, tied, 512)
    assert (checkpoint.activation, checkpoint.sizes["vocab"], checkpoint.sizes["residual"]) == ("silu", 257, 64)


def test_layers_and_the_rest_are_all_tensors_once(tiny_checkpoint: Make) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("qwen3", layers=3))
    names = [name for layer in (None, 0, 1, 2) for name in checkpoint.names_of_layer(layer)]
    assert sorted(names) == sorted(checkpoint.reader.tensors)
    assert "model.norm.weight" in checkpoint.names_of_layer(None)
    assert all(".1." in name for name in checkpoint.names_of_layer(1))


def test_missing_folder_and_missing_config(tmp_path: Path, tiny_checkpoint: Make) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder here"):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="found: a file"):
        path = tmp_path / "file"
        path.touch()
        Checkpoint.open(path)
    folder = tiny_checkpoint()
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json[\s\S]*model\.safetensors"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_config_that_is_no_json_object(tiny_checkpoint: Make, text: str) -> None:
    folder = tiny_checkpoint()
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json is not"):
        Checkpoint.open(folder)


def test_unknown_architecture_names_the_nearest_the_list_and_the_way(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, model_type="qwen4")
    with pytest.raises(UnknownArchitectureError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert "'qwen4'" in message and "did you mean 'qwen" in message and "CONTRIBUTING.md" in message
    assert all(name in message for name in ("llama", "mistral", "qwen2", "qwen3"))
    assert caught.value.exit_code == 3


def test_other_heads_and_configs_without_a_type_are_refused(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(CheckpointError, match=r"not a causal language model[\s\S]*LlamaForSequenceClassification"):
        Checkpoint.open(folder)
    edit_config(folder, model_type=None)
    with pytest.raises(CheckpointError, match="no model_type"):
        Checkpoint.open(folder)


def test_quantised_weights_are_refused_with_the_reason(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint()
    edit_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(CheckpointError, match=r"quantised[\s\S]*awq[\s\S]*full-precision"):
        Checkpoint.open(folder)


def test_config_and_weights_that_disagree_are_listed_in_full(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint(layers=3)
    tensors = read_tensors(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(95, 64)
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(96)
    del tensors["model.norm.weight"]
    write_tensors(folder / "model.safetensors", tensors)
    edit_config(folder, vocab_size=300)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    lines = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert len(lines) == 5
    for part in (
        "model.layers.1.mlp.up_proj.weight: has shape (95, 64), config.json says (96, 64)",
        "model.layers.0.mlp.up_proj.bias: unexpected",
        "model.norm.weight: missing",
        "model.embed_tokens.weight: has shape (257, 64), config.json says (300, 64)",
        "lm_head.weight: has shape (257, 64), config.json says (300, 64)",
    ):
        assert any(part in line for line in lines), part


def test_leftover_rotary_buffers_are_no_mismatch(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint()
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    write_tensors(folder / "model.safetensors", {**read_tensors(folder / "model.safetensors"), **buffers})
    checkpoint = Checkpoint.open(folder)
    assert set(buffers) <= set(checkpoint.reader.tensors)
    assert not set(buffers) & set(checkpoint.slots)


def test_side_files_are_copied_and_nothing_else(tmp_path: Path, tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint()
    for name in ("merges.txt", "LICENSE", "chat_template.jinja", "modeling_evil.py", "training_args.bin", "README.md"):
        (folder / name).write_text(name)
    target = tmp_path / "target"
    target.mkdir()
    copied = copy_side_files(folder, target)
    assert copied == sorted(path.name for path in target.iterdir()) == [path.name for path in side_files(folder)]
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"} < set(copied)
    assert not {"modeling_evil.py", "training_args.bin", "README.md", "config.json", "model.safetensors"} & set(copied)
    assert (target / "merges.txt").read_text() == "merges.txt"


def test_truncated_shard_is_an_artifact_error(tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="truncated"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_names_of_old_checkpoints_are_completed(tmp_path: Path, tiny_checkpoint: Make, family: str) -> None:
    """The first GPT-2 and OPT files were saved from the model without its head, and with its masks."""
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint(family, tied=True)
    tensors = read_tensors(folder / "model.safetensors")
    prefix = known_families()[family].prefix
    short = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if family == "gpt2":
        short["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    write_tensors(folder / "model.safetensors", short)
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.slots) == set(tensors)
    transform(checkpoint, [], tmp_path / "out", shard_bytes=10**9)
    written = read_tensors(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    assert len(written) == len(tensors)
    tokens = torch.arange(20)[None]
    stock = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    stream = LayerStream(checkpoint)
    (hidden,) = final_states(stream, [Batch(tokens)])
    logits = torch.cat([piece for _, piece in stream.logits_pieces(hidden.flatten(0, 1))], dim=1)
    torch.testing.assert_close(logits, stock[0], atol=1e-5, rtol=1e-5)
