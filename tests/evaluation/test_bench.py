"""``bench``: what is counted and compared. Clocks are replaced: no test depends on how fast anything runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_checkpoint, save_tokenizer
from dynamic_models import dynamic_model, neurons_model, token_ids

from dynaconv.arch.checkpoint import Checkpoint
from dynaconv.arch.registry import known_families
from dynaconv.arch.stock import load_dense
from dynaconv.dynamic.dial import Dial
from dynaconv.dynamic.recorder import Recorder
from dynaconv.errors import ConfigError
from dynaconv.evaluation import bench, bench_models, shapes
from dynaconv.evaluation.bench import Sizes, Speeds, StepRecorder, Took
from dynaconv.evaluation.bench_picture import draw_speeds
from dynaconv.evaluation.cost import CostModel

CPU = torch.device("cpu")
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SIZES = Sizes(batch=1, prompt=4, tokens=6, rounds=2)


@pytest.fixture(scope="module")
def subject() -> bench_models.Subject:
    return bench_models.of_shape(TINY, [0.4, 0.6], SIZES, CPU, torch.bfloat16)


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BUFFER", 8000)


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is a second later than the one before."""
    seconds = itertools.count()
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: float(next(seconds))))


def measured(subject: bench_models.Subject, dials: list[Dial], sizes: Sizes = SIZES) -> Speeds:
    return bench.measure(subject.parent, subject.model, subject.cost, dials, subject.prompt, sizes)


def test_random_models_share_their_weights_and_agree_at_the_full_dial(subject: bench_models.Subject) -> None:
    held = {parameter.data_ptr() for parameter in subject.parent.parameters()}
    assert {value.data_ptr() for value in subject.model.dense_state().values()} == held
    ids = torch.randint(200, (2, 9))
    with torch.no_grad():
        assert torch.equal(subject.model(ids, dial=1.0).logits, subject.parent(ids).logits)
        assert not torch.equal(subject.model(ids, dial=0.4).logits, subject.parent(ids).logits)
    assert subject.parent.lm_head.weight.data_ptr() == subject.parent.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("family", known_families())
def test_a_folder_gives_its_parent_in_the_same_memory(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "parent", family)
    dynamic_model(folder, "linear").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    found = bench_models.of_folder(tmp_path / "model", SIZES, CPU)
    held = {parameter.data_ptr() for parameter in found.parent.parameters()}
    assert held <= {value.data_ptr() for value in found.model.dense_state().values()}
    with torch.no_grad():
        ids = token_ids()
        assert torch.equal(found.parent(ids).logits, load_dense(folder, CPU)(ids).logits)
    assert found.prompt.shape == (1, 4)
    assert found.cost == CostModel.of(Checkpoint.open(folder), context=SIZES.context)


def test_random_weights_are_those_of_the_seed_with_norms_of_one() -> None:
    checkpoint = shapes.imagined(TINY, torch.float32)
    one, same, other = (shapes.random_parent(checkpoint, CPU, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    for name, value in one.items():
        if value.dim() == 1:
            assert torch.equal(value, torch.ones_like(value))
        else:
            assert not torch.equal(value, other[name])
            assert float(value.std()) == pytest.approx(shapes.DEVIATION, rel=0.1)


def test_budgets_of_a_random_model_read_what_they_name(subject: bench_models.Subject) -> None:
    tokens = torch.randint(200, (4, 64), generator=torch.Generator().manual_seed(7))
    for budget in (0.4, 0.6):
        recorder = Recorder()
        with torch.no_grad(), subject.model.call.using(subject.model.policy(Dial(budget=budget)), recorder):
            subject.model(tokens, use_cache=False)
        assert float(recorder.all_costs()[2].mean()) == pytest.approx(budget, abs=0.03)


def test_a_budget_below_the_routers_is_refused() -> None:
    with pytest.raises(ConfigError, match="routers alone"):
        bench_models.of_shape(TINY, [0.01], SIZES, CPU, torch.bfloat16)


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_published_shapes_are_whole_and_can_be_cut(name: str) -> None:
    whole = shapes.imagined(shapes.shape_config(name), torch.bfloat16)
    parameters = {"llama-1b": 1_235_814_400, "llama-8b": 8_030_261_248, "qwen3-0.6b": 596_049_920}
    assert whole.parameters == parameters[name]
    cut = shapes.imagined(shapes.shape_config(name, layers=2, vocab=100), torch.bfloat16)
    assert (cut.layers, cut.sizes["vocab"], cut.sizes["ffn"]) == (2, 100, whole.sizes["ffn"])
    empty = shapes.empty_model(cut, CPU)
    assert {name: tuple(p.shape) for name, p in empty.named_parameters()} == {
        name: slot.shape for name, slot in cut.slots.items()
    }


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"name": "llama-1"}, "llama-1b"),
        ({"name": "llama-1b", "layers": 17}, "16"),
        ({"name": "llama-1b", "vocab": 0}, "128256"),
    ],
)
def test_shapes_that_there_are_not(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        shapes.shape_config(**asked)


def test_what_is_measured_follows_from_times_and_bytes(subject: bench_models.Subject, ticking: None) -> None:
    speeds = measured(subject, [Dial(budget=0.4), Dial.full()])
    parent, (low, full) = speeds.parent, speeds.dials
    assert speeds.bandwidth == 8000.0, "one second for the buffer"
    # The clock is read as generate begins, and once for each token, the prompt included: two seconds, then one each.
    for one in (parent, low, full):
        assert (one.first_token_s, one.tokens_per_s, one.measured) == (2.0, 1.0, 1.0)
        assert one.bytes_per_step == pytest.approx(subject.cost.bytes_per_token(one.ffn_bytes_share))
        assert one.bandwidth_share == pytest.approx(one.bytes_per_step / 8000)
        assert one.promised == pytest.approx(parent.bytes_per_step / one.bytes_per_step)
    assert (parent.dial, low.dial, full.dial) == (None, 0.4, 1.0)
    assert full.bytes_per_step == parent.bytes_per_step == 2 * (subject_elements(subject) + 64 + 2 * 2 * 2 * 16 * 7)
    assert low.ffn_bytes_share == pytest.approx(0.4, abs=0.05)
    assert low.promised > 1


def subject_elements(subject: bench_models.Subject) -> int:
    return sum(parameter.numel() for parameter in subject.parent.parameters())


def test_candidates_take_turns_and_medians_count(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    seconds = {"a": iter([100.0, 1.0, 9.0, 2.0]), "b": iter([5.0, 5.0, 5.0, 5.0])}

    def candidate(name: str) -> Callable[[], Took]:
        return lambda: Took(0.0, next(seconds[name]))

    found = bench._in_turns({name: candidate(name) for name in seconds}, 3, turns.append)
    assert turns == ["a", "b"] * 4
    assert (found["a"].step, found["b"].step) == (2.0, 5.0), "the first turn is warming up"


def test_every_turn_is_announced(subject: bench_models.Subject) -> None:
    turns: list[str] = []
    dials = [Dial(budget=0.4), Dial.full()]
    bench.measure(subject.parent, subject.model, subject.cost, dials, subject.prompt, SIZES, finished=turns.append)
    assert len(turns) == SIZES.turns(2)


def test_all_tokens_are_generated_whatever_ends_a_sequence(subject: bench_models.Subject) -> None:
    """Every token ends a sequence, and generation goes on."""
    kept = subject.parent.generation_config.eos_token_id
    subject.parent.generation_config.eos_token_id = list(range(199))
    try:
        assert bench._generating(subject.parent, subject.prompt, 6)().step > 0
    finally:
        subject.parent.generation_config.eos_token_id = kept


def recorded(model: Any, prompt: torch.Tensor, dial: Dial, itemsize: int = 4) -> StepRecorder:
    recorder = StepRecorder(model.ffns(), itemsize)
    with torch.inference_mode(), model.call.using(recorder=recorder):
        bench.decoding(model, prompt, 5, dial=dial)()
    return recorder


def shares(model: Any, prompt: torch.Tensor, dial: Dial) -> torch.Tensor:
    """Bytes shares (L, steps, B) of what ``generate`` decodes."""
    recorder = Recorder()
    with torch.inference_mode(), model.call.using(recorder=recorder):
        bench.decoding(model, prompt, 5, dial=dial)()
    steps = [[one[2, :, 0] for one in recorder.shares[layer][1:]] for layer in sorted(recorder.shares)]
    return torch.stack([torch.stack(layer) for layer in steps])


@pytest.fixture(params=["sketch", "linear", "width"])
def model(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Iterator[Any]:
    folder = tiny_checkpoint("llama")
    yield neurons_model(folder) if request.param == "sketch" else dynamic_model(folder, request.param)


def test_a_sequence_alone_reads_what_its_tokens_use(model: Any) -> None:
    prompt, dial = token_ids(1), Dial(0.5, controlled=False)
    recorder, wanted = recorded(model, prompt, dial), shares(model, prompt, dial)
    assert len(recorder.read) == 2 * 4, "layers times steps, the first token comes of the prompt"
    assert recorder.share == pytest.approx(float(wanted.mean()))


def test_a_batch_reads_each_neuron_once(model: Any) -> None:
    prompt, dial = token_ids(3), Dial(0.5, controlled=False)
    together, apart = recorded(model, prompt, dial).share, shares(model, prompt, dial)
    assert float(apart.max(-1).values.mean()) <= together + 1e-9 <= float(apart.sum(-1).mean()) + 2e-9
    same = recorded(model, prompt[:1].expand(3, -1), dial).share
    assert same == pytest.approx(recorded(model, prompt[:1], dial).share), "equal tokens use equal neurons"


def test_the_full_dial_reads_everything_as_the_parent_does(model: Any) -> None:
    recorder = recorded(model, token_ids(2), Dial.full())
    assert (recorder.share, recorder.path) == (1.0, "dense")


def test_the_path_is_what_dispatch_decides(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama")
    for kind, path in (("linear", "cpu-routed"), ("width", "cpu-nested")):
        recorder = recorded(dynamic_model(folder, kind), token_ids(1), Dial(0.5))
        assert recorder.path.split(",")[0] == path
        assert recorder.reason


def test_weights_held_in_another_dtype_cost_what_they_are_held_in(tiny_checkpoint: Callable[..., Path]) -> None:
    model = neurons_model(tiny_checkpoint("llama"))
    dial, cost = Dial(0.5, controlled=False), model.ffns()[0].cost
    four, two = (recorded(model, token_ids(1), dial, itemsize).share for itemsize in (4, 2))
    assert two > four, "codes are a larger share of half as many bytes"
    assert model.ffns()[0].cost == cost, "the model goes on counting as it did"


def test_a_step_of_several_sequences_reads_weights_once(tmp_path: Path) -> None:
    cost = CostModel.of(Checkpoint.open(make_checkpoint(tmp_path / "dense")), context=10)
    one, two, three = (cost.bytes_per_step(0.5, sequences) for sequences in (1, 2, 3))
    assert one == cost.bytes_per_token(0.5)
    assert two - one == three - two == 4 * (64 + 10 * cost.cache_width)


def test_prompts_are_cut_from_text() -> None:
    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    cut = bench_models.prompt_of("abcdef", tokenizer, Sizes(batch=2, prompt=4))
    assert ["".join(map(chr, row)) for row in cut.tolist()] == ["abcd", "defa"]
    with pytest.raises(ConfigError, match="no tokens"):
        bench_models.prompt_of("", tokenizer, Sizes())


def test_memory_is_looked_at_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_models, "free_bytes", lambda device: 12_000_000_000)
    monkeypatch.setattr(bench_models, "random_parent", lambda *args: pytest.fail("it was made"))
    with pytest.raises(ConfigError, match="not enough memory") as raised:
        bench_models.of_shape(shapes.shape_config("llama-8b"), [0.5], Sizes(), CPU, torch.bfloat16)
    layers = int(str(raised.value.hint).split()[1].rstrip(","))
    needs = [
        bench_models._needed(shapes.shape_config("llama-8b", layers=n), torch.bfloat16) for n in (layers, layers + 1)
    ]
    assert needs[0] <= 12_000_000_000 < needs[1], "as many layers as fit"


def test_no_layer_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_models, "free_bytes", lambda device: 1000)
    with pytest.raises(ConfigError, match="smaller shape"):
        bench_models.of_shape(TINY, [0.5], Sizes(), CPU, torch.bfloat16)


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_the_picture(subject: bench_models.Subject, tmp_path: Path, ending: str) -> None:
    speeds = measured(subject, [Dial(budget=0.4), Dial.full()])
    draw_speeds(speeds, tmp_path / f"speed{ending}", name="a $name_")
    draw_speeds(speeds, tmp_path / f"again{ending}", name="another")
    one, other = ((tmp_path / f"{name}{ending}").read_bytes() for name in ("speed", "again"))
    assert one != other
    assert len(one) > 1000
