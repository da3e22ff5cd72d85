"""Recipes and overrides: all that come along compose, and every mistake is said, with what to do."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dynaconv.config import RunConfig
from dynaconv.errors import ConfigError
from dynaconv.overrides import parse, schema
from dynaconv.pipeline.registry import names as stage_names
from dynaconv.recipes import DEFAULT, available, compose, draft, find, load, recipe_folder
from dynaconv.rules import problems
from dynaconv.train.stage import FinetuneStage

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "recipes").glob("*.yaml"))
ENGINES = sorted((ROOT / "recipes" / "engine").glob("*.yaml"))
PATH_TEXT = st.text(st.characters(blacklist_characters=",", blacklist_categories=("Cc", "Cs", "Z")), min_size=1)


def mistakes(overrides: Sequence[str], recipe: str = DEFAULT) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(recipe, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_composes_and_is_right(path: Path) -> None:
    config = compose(str(path))
    assert isinstance(config, RunConfig)
    assert problems(config) == []
    assert "finetune" not in config.stages or FinetuneStage().problems(config) == []
    assert set(config.stages) <= set(stage_names())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_says_what_it_is_needs_and_how_to_run_it(path: Path) -> None:
    recipe = find(str(path))
    assert 20 < len(recipe.summary) <= 120
    assert "\nNeeds: " in recipe.header
    (command,) = re.findall(r"^Run:\s+(dynaconv convert .*)$", recipe.header, re.MULTILINE)
    assert f"--recipe {path.stem}" in command or (path.stem == DEFAULT and "--recipe" not in command)
    overrides = [word for word in command.split() if "=" in word]
    assert compose(str(path), overrides)


@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
def test_every_engine_is_right_and_says_what_it_needs(path: Path, tmp_path: Path) -> None:
    header = find(str(path)).header
    assert 20 < len(header.partition("\n")[0]) <= 120
    assert "\nNeeds: " in header
    (command,) = re.findall(r"^Run:\s+(dynaconv convert .*)$", header, re.MULTILINE)
    assert f" engine={path.stem} " in command
    config = compose(overrides=[word for word in command.split() if "=" in word])
    assert problems(config) == []
    assert {f"engine.{name}" for name in yaml.safe_load(path.read_text())} <= set(schema())
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"# Mine.\ndefaults:\n  - nested\n  - engine: {path.stem}\n  - _self_\n")
    assert compose(str(mine)).engine == config.engine
    assert compose(str(mine), [f"engine={path.stem}", "engine.nproc=2"]).engine.nproc == 2


def test_the_engines_there_are() -> None:
    assert {path.stem for path in ENGINES} == {"cpu", "single", "zero2", "zero3", "zero3-offload"}
    assert compose(overrides=["engine=cpu"]) == compose()
    assert compose(overrides=["engine=zero3-offload"]).engine.zero_stage == 3


def test_the_default_comes_first_and_equals_the_schema() -> None:
    assert next(iter(available())) == DEFAULT
    assert compose() == RunConfig(), "the schema documents the defaults, the recipe shows them: keep them the same"


def test_recipes_that_differ_from_the_default_differ_as_they_say() -> None:
    assert compose("nested-difficulty").finetune.router == "class"
    assert compose("nested-curve").finetune.router == "curve"
    routed = compose("routed")
    assert (routed.experts, routed.finetune.router, routed.finetune.uniform_share) == ("routed", "auto", 0.0)
    assert routed.finetune.losses == compose("nested").finetune.losses
    assert compose("nested-uniform").finetune.router == "uniform"
    half = compose("static-half")
    assert half.finetune.budgets == [0.5, 0.5] and half.finetune.losses.full.weight == 0.0
    assert half.finetune.tokens == routed.finetune.tokens, "baselines are trained on as much"
    assert "finetune" not in compose().stages
    tuned = compose("tune")
    assert (tuned.experts, tuned.sketch, tuned.calibrate) == ("neurons", compose().sketch, compose().calibrate)
    assert tuned.finetune.tokens == routed.finetune.tokens
    assert compose("smoke").finetune.tokens < tuned.finetune.tokens / 10


def test_overrides_of_every_kind() -> None:
    overrides = [
        "experts=routed",
        "block_size=8",
        "finetune.tokens=2e6",
        "finetune.learning_rate=1e-4",
        "+export.check=false",
        "++finetune.budgets=[0.2, 0.6]",
        "calibrate.budgets=[1]",
        "stages=profile,carve",
        "data.validation=null",
        "data.field='two words'",
        "finetune.router=linear",
        "finetune.bound=null",
        "finetune.router_rank=0",
        "profile.batch_size=${finetune.batch_size}",
        "finetune.batch_size=4",
    ]
    config = compose(overrides=overrides)
    assert (config.block_size, config.finetune.tokens, config.finetune.learning_rate) == (8, 2_000_000, 1e-4)
    assert (config.export.check, config.finetune.budgets, config.calibrate.budgets) == (False, [0.2, 0.6], [1.0])
    assert (config.stages, config.data.validation, config.data.field) == (["profile", "carve"], None, "two words")
    assert config.profile.batch_size == 4
    assert (config.finetune.router, config.finetune.bound, config.finetune.router_rank) == ("linear", None, 0)


def test_data_is_short_for_the_training_text() -> None:
    assert compose(overrides=["data=a.txt"]).data.train == ["a.txt"]
    assert compose(overrides=["data=a.txt,python-stdlib"]).data.train == ["a.txt", "python-stdlib"]
    assert compose(overrides=["data=[a.txt,'b,c.txt']"]).data.train == ["a.txt", "b,c.txt"]
    assert compose(overrides=["data.validation=b.txt"]).data.validation == ["b.txt"]
    assert compose(overrides=["data=~/b.txt"]).data.train == [str(Path("~/b.txt").expanduser())]


@pytest.mark.parametrize(
    "name",
    ["with space.txt", "a=b.txt", "it's (a) {b}.txt", "[x].txt", "${HOME}.txt", 'quote".txt', "x,y.txt", "#%&;.txt"],
)
def test_a_path_may_be_called_anything(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("text")
    assert compose(overrides=[f"data={path}"]).data.train == [str(path)]
    assert compose(overrides=[f"source={path}"]).source == str(path)


@given(PATH_TEXT, PATH_TEXT)
def test_text_is_taken_as_it_stands(first: str, second: str) -> None:
    texts = [f"data=./{first},/{second}", f"source=./{first}"]
    values, wrong = parse(texts)
    assert wrong == []
    assert values["data.train"] == [f"./{first}".replace("${", "\\${"), f"/{second}".replace("${", "\\${")]
    assert values["source"] == f"./{first}".replace("${", "\\${")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("block=3", "did you mean 'blocks'?"),
        ("fintune.tokens=3", "did you mean 'finetune'?"),
        ("finetune.lerning_rate=3", "did you mean 'learning_rate'?"),
        ("finetune.lerning_rate=3", "available: accumulation, anchor"),
        ("tokens=3", "profile.tokens or finetune.tokens or calibrate.tokens"),
        ("calibrate.loss_aware=true", "did you mean profile.loss_aware?"),
        ("quatsch=3", "available: block_size, blocks, calibrate"),
        ("finetune=3", "finetune is a section"),
        ("engine=zero4", "engine is 'zero4'; did you mean 'zero"),
        ("engine=", "engine is a section"),
        ("blocks", "'blocks' is not KEY=VALUE"),
        ("=3", "'=3' is not KEY=VALUE"),
        ("~blocks", "'~blocks' is not KEY=VALUE"),
        ("blocks=four", "blocks is 'four'; it must be a whole number"),
        ("blocks=4.5", "blocks is 4.5; it must be a whole number"),
        ("blocks=true", "blocks is True; it must be a whole number"),
        ("seed=null", "seed is None; it must be a whole number"),
        ("blocks=", "it must be a whole number"),
        ("blocks=4,8", "blocks is '4,8', several values"),
        ("finetune.clip=(", "finetune.clip is '('; it must be a number"),
        ("export.check=maybe", "export.check is 'maybe'; it must be true or false"),
        ("calibrate.budgets=0.5", "calibrate.budgets is 0.5; it must be a list of numbers"),
        ("calibrate.budgets=[a]", "it must be a list of numbers"),
        ("data=", "at least one file, folder or name"),
        ("finetune.precision=bf-16", "one of fp32, bf16 ('bf16'?)"),
        ("finetune.clip=${nope}", "finetune.clip: "),
    ],
)
def test_a_wrong_override_is_said_and_what_is_right(override: str, said: str) -> None:
    assert said in mistakes([override])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["blocks=64"], "blocks is 64, but experts is 'neurons'(.|\\n)*leave blocks out"),
        (["block_size=8"], "block_size is 8, but experts is 'neurons'(.|\\n)*experts=routed"),
        (["experts=routed", "blocks=64"], "blocks is 64, but experts is 'routed'(.|\\n)*say block_size"),
        (["experts=nested", "block_size=16"], "block_size is 16, but experts is 'nested'(.|\\n)*say blocks"),
        (["experts=nested", "blocks=4", "block_size=16"], "block_size is 16"),
    ],
)
def test_a_number_of_blocks_where_a_size_is_meant_is_refused_with_the_way_out(overrides, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(overrides=overrides)


def test_a_recipe_from_before_block_size_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("experts: routed\nblocks: 64\n")
    with pytest.raises(ConfigError, match="leave blocks out"):
        load(path)


def test_all_mistakes_at_once() -> None:
    told = mistakes(["block=3", "finetune.tokens=x", "seed", "profile.tokens=0", "data=a", "data.train=[b]", "seed=-1"])
    for part in (
        "6 mistakes",
        "unknown key 'block'",
        "finetune.tokens",
        "'seed' is not",
        "profile.tokens is 0",
        "given twice",
        "seed is -1",
    ):
        assert part in told
    assert "where: recipe default" in told


def test_a_recipe_of_ones_own_builds_on_another(tmp_path: Path) -> None:
    folder = tmp_path / "my recipes = [odd]"
    folder.mkdir()
    path = folder / "mine v1.2.yaml"
    path.write_text(
        "# Mine.\ndefaults: [smoke, _self_]\nblock_size: 1\nfinetune:\n  wandb: off\n  tokens: 2e5\ndata:\n"
    )
    config = compose(str(path), ["seed=3"])
    smoke = compose("smoke")
    assert (config.block_size, config.seed, config.finetune.wandb, config.finetune.tokens) == (1, 3, "off", 200_000)
    assert config.calibrate == smoke.calibrate
    assert find(str(path)).header == "Mine."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("blocks: [1\n", "cannot be read"),
        ("- blocks\n", "cannot be read"),
        ("defaults: [nestd]\n", "nestd"),
        ("blocks: ${\n", "does not parse"),
        ("blocks: ${nope}\n", "nope"),
        ("block: 3\nfinetune: {tokens: x}\n", "2 mistakes"),
        ("\xff", "mine"),
    ],
)
def test_a_recipe_that_cannot_be_used(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text.encode("latin-1"))
    assert said in mistakes([], str(path))


@pytest.mark.parametrize("name", ["nestd", "absent.yaml", "", "README.md"])
def test_a_recipe_that_is_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no recipe .*\n  expected: one of default"):
        find(name)


def test_a_resolved_recipe_is_read_back_the_same(tmp_path: Path) -> None:
    from dataclasses import asdict

    config = compose("default", ["data=a b.txt,c", "finetune.wandb=off", "finetune.learning_rate=1e-5"])
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(asdict(config)))
    assert load(path) == config
    assert load(path, ["block_size=1"]).block_size == 1
    path.write_text("- not a mapping")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(path)


def test_a_draft_keeps_what_could_be_understood() -> None:
    made = draft("smoke", ["block_size=4", "finetune.tokens=x", "nope=1"])
    assert made.config.block_size == 4
    assert len(made.mistakes) == 2


def test_every_field_has_a_type_that_can_be_explained() -> None:
    from dynaconv.overrides import TYPE_WORDS

    assert {hint for hint, _ in schema().values()} <= set(TYPE_WORDS)


def test_composing_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    monkeypatch.chdir(tmp_path)
    handlers = list(logging.getLogger().handlers)
    compose("smoke", ["block_size=1"])
    assert list(tmp_path.iterdir()) == [], "no job folder"
    assert logging.getLogger().handlers == handlers


def test_an_installed_wheel_has_the_recipes(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, text=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = "import dynaconv.recipes as r; print(r.recipe_folder()); print(*r.available()); r.compose('smoke')"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {code}"]
    folder, listed = subprocess.run(
        command, cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert Path(folder) == site / "dynaconv" / "recipes"
    assert listed.split() == list(available())
    assert recipe_folder() == ROOT / "recipes", "and a checkout uses its own"
    assert (site / "dynaconv" / "py.typed").is_file()
