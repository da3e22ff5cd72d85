"""Each family's table against the models transformers builds: the same names and shapes, whatever the config."""

from __future__ import annotations

import json
import tempfile
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, tiny_settings

from dynaconv.arch.check import mismatches
from dynaconv.arch.registry import known_families
from dynaconv.arch.spec import AXES, PARTS
from dynaconv.artifacts.tensors import CheckpointReader, TensorInfo
from dynaconv.errors import CheckpointError

HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}
VARIANTS = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    ("mistral", {"head_dim": 20}),
    ("qwen3", {"head_dim": 12}),
    ("qwen3", {"attention_bias": True, "head_dim": 16}),
    ("gemma2", {"attention_bias": True}),
    ("olmo2", {"attention_bias": True}),
    ("gpt_neox", {"attention_bias": False}),
    ("opt", {"enable_bias": False}),
    ("starcoder2", {"use_bias": False}),
]


def stock_model(family: str, **settings: Any) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Content of config.json, and the tensors, as transformers saves a model: names in memory may be others."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **settings)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        return json.loads(Path(folder, "config.json").read_text()), CheckpointReader(Path(folder)).tensors


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("family", "extra"), VARIANTS)
def test_slots_are_what_transformers_builds(family: str, extra: dict[str, Any], heads: str, tied: bool) -> None:
    q_heads, kv_heads = HEADS[heads]
    sizes = {"vocab": 40, "hidden": 32, "ffn": 27, "layers": 3, "heads": q_heads, "kv_heads": kv_heads, "tied": tied}
    config, stored = stock_model(family, **{**tiny_settings(family, sizes), **extra})
    slots = known_families()[family].slots(config)
    assert {name: slot.shape for name, slot in slots.items()} == {n: tuple(t.shape) for n, t in stored.items()}
    assert known_families()[family].tied(config) is tied


SIZES = {"vocab": 40, "hidden": 32, "ffn": 27, "layers": 4, "heads": 4, "kv_heads": 2, "positions": 16}
SPARSE = {"llama": (None, 2), "mistral": (8, 16), "qwen2": (None, 2), "qwen3": (None, 2)}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_sparse_config_leaves_out_means_what_transformers_takes_it_to_mean(family: str) -> None:
    """Hub checkpoints leave out what was the default when they were written, ties and biases among it."""
    kv_heads, heads = SPARSE.get(family, (None, 4))
    sizes = {"vocab": 64, "positions": 32, "layers": 1, "hidden": 256, "heads": heads, "kv_heads": kv_heads}
    given = tiny_settings(family, sizes)
    given.pop("head_dim", None)
    kv_size = known_families()[family].sizes.get("kv_head")
    if kv_size is not None and kv_size.otherwise == "q_head":
        given["num_key_value_heads"] = None
    if family != "gpt2":  # the only one whose FFN need not be given
        given["ffn_dim" if family == "opt" else "intermediate_size"] = 64
    _, stored = stock_model(family, **given)
    config = {"model_type": family, **given}
    if family == "llama":
        del config["num_key_value_heads"]
    slots = known_families()[family].slots(config)
    assert {name: slot.shape for name, slot in slots.items()} == {n: tuple(t.shape) for n, t in stored.items()}


def test_what_is_not_resized_stays_though_its_default_would_move() -> None:
    family = known_families()["gpt2"]
    config = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_head": 4, "n_layer": 3, "model_type": "gpt2"}
    assert family.sizes_of(config)["ffn"] == 128
    grown = family.resized(config, {**family.sizes_of(config), "residual": 64, "q_head": 8}, [0, 1, 2, 2])
    assert (grown["n_embd"], grown["n_head"], grown["n_inner"], grown["n_layer"]) == (64, 8, 128, 4)
    assert grown["n_positions"] == 32


def test_sizes_that_no_model_of_the_family_has_are_refused() -> None:
    family = known_families()["gpt_neox"]
    config = {"vocab_size": 64, "intermediate_size": 64, "hidden_size": 32, "num_attention_heads": 4}
    config["num_hidden_layers"] = 2
    sizes = {**family.sizes_of(config), "residual": 64}
    with pytest.raises(CheckpointError, match="q_dim would be 16 instead of 8"):
        family.resized(config, sizes, [0, 1])


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_layers_keep_their_kind_of_attention(family: str) -> None:
    from transformers import AutoConfig

    config = {"model_type": family, **tiny_settings(family, SIZES)}
    types = AutoConfig.for_model(**config).layer_types
    assert len(set(types)) == 2
    table = known_families()[family]
    made = table.resized(config, table.sizes_of(config), [0, 1, 1, 3])
    assert AutoConfig.for_model(**made).layer_types == [types[layer] for layer in (0, 1, 1, 3)]


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"word_embed_proj_dim": 16}),
        ("gpt2", {"add_cross_attention": True}),
    ],
)
def test_what_only_shares_the_name_is_refused(family: str, change: dict[str, Any]) -> None:
    config = tiny_settings(family, SIZES)
    with pytest.raises(CheckpointError, match=f"{next(iter(change))} is .* supported for {family}"):
        known_families()[family].slots({**config, **change})


def test_every_file_in_families_is_one_family_of_that_name() -> None:
    from dynaconv.arch import families

    files = {path.stem for path in Path(families.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(known_families()) == files


def test_tables_use_known_axes_and_parts_and_never_name_a_tensor_twice() -> None:
    for family in known_families().values():
        axes = {axis for spec in family.tensors for dimension in spec.dimensions for axis in dimension.axes}
        assert axes == set(family.sizes) <= set(AXES)
        assert set(PARTS) - {"position"} <= {spec.part for spec in family.tensors} <= set(PARTS)
        assert {spec.part for spec in family.tensors if spec.contracts is not None} == {"attention", "ffn", "head"}
        assert any(spec.closes for spec in family.tensors)
        assert len({spec.name for spec in family.tensors}) == len(family.tensors)
        ffn = [f"{family.ffn.path}.{name}.weight" for name in (family.ffn.gate, family.ffn.up, family.ffn.down) if name]
        assert set(ffn) <= {spec.name for spec in family.tensors if spec.part == "ffn"}


def test_every_single_difference_is_found_and_like_ones_are_one_line() -> None:
    family = known_families()["llama"]
    config = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 27, "num_attention_heads": 4}
    slots = family.slots({**config, "num_hidden_layers": 5})
    stored = {name: SimpleNamespace(shape=slot.shape, dtype=torch.float32) for name, slot in slots.items()}
    assert mismatches(family, slots, stored, tied=False) == []
    assert prod(stored["model.layers.4.mlp.up_proj.weight"].shape) == 27 * 32

    for layer in (0, 1, 2, 4):
        stored[f"model.layers.{layer}.mlp.up_proj.weight"].shape = (26, 32)
    stored["model.norm.weight"].dtype = torch.int8
    del stored["lm_head.weight"]
    stored["model.layers.0.mlp.extra"] = SimpleNamespace(shape=(1,), dtype=torch.float32)
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = SimpleNamespace(shape=(4,), dtype=torch.float32)
    problems = mismatches(family, slots, stored, tied=False)
    assert len(problems) == 4
    assert any(p.startswith("model.norm.weight: is torch.int8") for p in problems)
    assert any(p.startswith("lm_head.weight: missing, expected shape (40, 32)") for p in problems)
    assert any(p.startswith("model.layers.0.mlp.extra: unexpected") for p in problems)
    up = next(p for p in problems if "up_proj" in p)
    assert up.startswith("model.layers.{layer}.mlp.up_proj.weight: has shape (26, 32), config.json says (27, 32)")
    assert up.endswith("(layers 0-2, 4)")


def test_a_stored_copy_of_a_tied_head_is_allowed_only_where_it_is_tied() -> None:
    family = known_families()["qwen2"]
    config = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 3, "num_attention_heads": 1}
    slots = family.slots({**config, "num_hidden_layers": 1, "tie_word_embeddings": True})
    stored = {name: SimpleNamespace(shape=slot.shape, dtype=torch.bfloat16) for name, slot in slots.items()}
    stored["lm_head.weight"] = SimpleNamespace(shape=(8, 4), dtype=torch.bfloat16)
    assert mismatches(family, slots, stored, tied=True) == []
    assert len(mismatches(family, slots, stored, tied=False)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": None}, "num_attention_heads must be a whole number"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number of at least 1, found '64'"),
        ({"intermediate_size": 0}, "intermediate_size must be"),
        ({"num_attention_heads": 5}, "head_dim is absent and residual 32 is not a multiple of q_head 5"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be"),
        ({"hidden_size": None, "vocab_size": -1}, "vocab_size must be .* hidden_size must be"),
    ],
)
def test_sizes_that_make_no_sense_are_named(change: dict[str, Any], message: str) -> None:
    config = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 27, "num_attention_heads": 4}
    config["num_hidden_layers"] = 2
    with pytest.raises(CheckpointError, match=message):
        known_families()["llama"].slots({**config, **change})
