"""Each family's table against the models transformers builds: the same names and shapes, whatever the config."""

from __future__ import annotations

import itertools
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dynaconv.arch.check import mismatches
from dynaconv.arch.registry import known_families
from dynaconv.arch.spec import AXES, PARTS

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}
VARIANTS = [
    ("llama", {}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    ("mistral", {}),
    ("mistral", {"head_dim": 20}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("qwen3", {"head_dim": 12}),
    ("qwen3", {"attention_bias": True, "head_dim": 16}),
]


def stock_model(family: str, **settings: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Content of config.json, and the stored tensors, of a model that transformers builds without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    stored = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    written = {**config.to_diff_dict(), "architectures": [type(model).__name__]}
    return written, stored


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("family", "extra"), VARIANTS)
def test_slots_are_what_transformers_builds(family: str, extra: dict[str, Any], heads: str, tied: bool) -> None:
    q_heads, kv_heads = HEADS[heads]
    config, stored = stock_model(
        family,
        vocab_size=40,
        hidden_size=32,
        intermediate_size=27,
        num_hidden_layers=3,
        num_attention_heads=q_heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        **extra,
    )
    slots = known_families()[family].slots(config)
    assert {name: slot.shape for name, slot in slots.items()} == {n: tuple(t.shape) for n, t in stored.items()}
    assert known_families()[family].tied(config) is tied


@pytest.mark.parametrize(
    ("family", "kv_heads", "heads"), [("llama", None, 2), ("mistral", 8, 16), ("qwen2", None, 2), ("qwen3", None, 2)]
)
def test_what_a_sparse_config_leaves_out_means_what_transformers_takes_it_to_mean(
    family: str, kv_heads: int | None, heads: int
) -> None:
    settings = {"vocab_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "hidden_size": 256}
    config, stored = stock_model(family, **settings, num_attention_heads=heads, num_key_value_heads=kv_heads)
    absent = ["head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings"]
    if family in ("llama", "mistral"):
        absent.append("num_key_value_heads")
    else:
        config["num_key_value_heads"] = None
    config = {field: value for field, value in config.items() if field not in absent}
    slots = known_families()[family].slots(config)
    assert {name: slot.shape for name, slot in slots.items()} == {n: tuple(t.shape) for n, t in stored.items()}


def test_every_file_in_families_is_one_family_of_that_name() -> None:
    from dynaconv.arch import families

    files = {path.stem for path in Path(families.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(known_families()) == files >= set(FAMILIES)


def test_tables_use_known_axes_and_parts_and_never_name_a_tensor_twice() -> None:
    for family in known_families().values():
        axes = set(itertools.chain.from_iterable(itertools.chain.from_iterable(s.factors for s in family.tensors)))
        assert axes <= set(AXES)
        assert set(family.sizes) == set(AXES)
        assert {spec.part for spec in family.tensors} == set(PARTS)
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
    from dynaconv.errors import CheckpointError

    config = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 27, "num_attention_heads": 4}
    config["num_hidden_layers"] = 2
    with pytest.raises(CheckpointError, match=message):
        known_families()["llama"].slots({**config, **change})
