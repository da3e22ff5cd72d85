"""Recipes: where they are, what they say of themselves, and how one becomes a checked :class:`RunConfig`.

A recipe is a YAML file that hydra composes: it may start from another one (``defaults: [nested, _self_]``). It is found
by name among those that come with dynaconv, in a checkout (``recipes/``) and in an installed wheel
(``dynaconv/recipes/``) alike, or by path. Hydra is imported when a recipe is composed, not before.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dynaconv.config import RunConfig
from dynaconv.errors import ConfigError, suggest
from dynaconv.overrides import assign, parse
from dynaconv.rules import problems

DEFAULT = "default"
GROUPS = ("engine",)  # sections with ready settings in files of their own: engine=zero2, or in a recipe's defaults


@dataclass(frozen=True)
class Recipe:
    """One recipe file.

    Attributes:
        name: What ``--recipe`` calls it.
        path: Where it is.
        header: Its leading comment, without the comment signs.
    """

    name: str
    path: Path
    header: str

    @property
    def summary(self) -> str:
        """First line of the header."""
        return self.header.partition("\n")[0]


def recipe_folder() -> Path:
    """Folder of the recipes that come with dynaconv."""
    package = Path(__file__).resolve().parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def available() -> dict[str, Recipe]:
    """Recipes that come with dynaconv, by name, the default first."""
    recipes = [_read(path) for path in sorted(recipe_folder().glob("*.yaml"))]
    return {recipe.name: recipe for recipe in sorted(recipes, key=lambda recipe: recipe.name != DEFAULT)}


def find(name: str) -> Recipe:
    """The recipe called ``name``, or the one in the file ``name``.

    Raises:
        ConfigError: There is no such recipe or file.
    """
    shipped = available()
    if name in shipped:
        return shipped[name]
    path = Path(name).expanduser()
    if path.suffix == ".yaml" and path.is_file():
        return _read(path.resolve())
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f"--recipe {near[0]}" if near else "`dynaconv recipes` lists them"
    raise ConfigError(f"no recipe {name!r}", expected=f"one of {', '.join(shipped)}, or a .yaml file", hint=hint)


def _read(path: Path) -> Recipe:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("the recipe cannot be read", where=path, found=error) from error
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" ").rstrip())
    return Recipe(path.stem, path, "\n".join(lines).strip())


@dataclass(frozen=True)
class Draft:
    """A configuration and what is wrong with how it was asked for.

    Attributes:
        config: Everything that could be understood; the rest at its default.
        mistakes: Unknown keys and values of the wrong kind, one sentence each.
        where: Which recipe it is.
    """

    config: RunConfig
    mistakes: tuple[str, ...]
    where: str

    def checked(self) -> RunConfig:
        """The configuration, if nothing is wrong with it.

        Raises:
            ConfigError: Lists every mistake.
        """
        found = [*self.mistakes, *problems(self.config)]
        if found:
            raise ConfigError.from_problems(found, where=self.where)
        return self.config


def compose(recipe: str = DEFAULT, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked configuration of ``recipe`` (a name or a file) with ``overrides`` (``KEY=VALUE`` each).

    Raises:
        ConfigError: Lists every mistake in the recipe and the overrides.
    """
    return draft(recipe, overrides).checked()


def draft(recipe: str = DEFAULT, overrides: Sequence[str] = ()) -> Draft:
    """As :func:`compose`, with mistakes returned, not raised.

    Raises:
        ConfigError: The recipe cannot be found or read at all.
    """
    found = find(recipe)
    return _resolve(_composed(found.path), overrides, where=f"recipe {found.name}")


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked configuration in ``path``, the ``recipe.yaml`` of a run, with ``overrides``.

    Raises:
        ConfigError: Lists every mistake in the file and the overrides.
    """
    return draft_of(path, overrides).checked()


def draft_of(path: Path, overrides: Sequence[str] = ()) -> Draft:
    """As :func:`load`, with mistakes returned, not raised.

    Raises:
        ConfigError: The file cannot be read at all.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("the recipe cannot be read", where=path, found=error) from error
    if not isinstance(content, Mapping):
        raise ConfigError("the recipe cannot be read", where=path, expected="KEY: VALUE lines", found=content)
    return _resolve(content, overrides, where=str(path))


def _composed(path: Path) -> dict[Any, Any]:
    """Hydra's composition of the file ``path``; the recipes that come with dynaconv may stand in its defaults."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    shipped = str(recipe_folder()).replace("\\", "\\\\").replace("'", "\\'")
    try:
        with initialize_config_dir(config_dir=str(path.parent), version_base="1.3"):
            composed = hydra_compose(path.stem, overrides=[f"hydra.searchpath=['file://{shipped}']"])
    except MissingConfigException as error:
        hint = f"a recipe beside it, or one of {', '.join(available())}"
        raise ConfigError(
            "the recipe's defaults name another that is not there", where=path, found=error.missing_cfg_file, hint=hint
        ) from error
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        found = str(error) or f"an interpolation that does not parse ({type(error).__name__})"
        raise ConfigError("the recipe cannot be read", where=path, found=found) from error
    content = OmegaConf.to_container(composed)
    return content if isinstance(content, dict) else {}


def choices(group: str) -> dict[str, Path]:
    """Files of ready settings for the section ``group``, by name."""
    return {path.stem: path for path in sorted((recipe_folder() / group).glob("*.yaml"))}


def _chosen(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Ready settings that ``GROUP=NAME`` asks for, the other overrides, and what is wrong with the names."""
    import yaml

    settings: dict[str, Any] = {}
    rest, mistakes = [], []
    for text in overrides:
        key, _, name = (part.strip() for part in text.lstrip("+").partition("="))
        files = choices(key) if key in GROUPS else {}
        if key not in GROUPS or not name:
            rest.append(text)
        elif key in settings:
            mistakes.append(f"{key} is given twice ({text!r} is the second)")
        elif name not in files:
            mistakes.append(f"{key} is {name!r}; {suggest(name, files)}, or set one of its fields")
        else:
            settings[key] = yaml.safe_load(files[name].read_text(encoding="utf-8"))
    return settings, rest, mistakes


def _resolve(content: Mapping[Any, Any], overrides: Sequence[str], *, where: str) -> Draft:
    """Puts ``overrides`` over ``content``, resolves interpolations, and checks everything against the schema."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    chosen, overrides, unknown = _chosen(overrides)
    values, mistakes = parse(overrides)
    mistakes = [*unknown, *mistakes]
    try:
        merged = OmegaConf.merge(OmegaConf.create(dict(content)), OmegaConf.create(chosen))
        for key, value in values.items():
            OmegaConf.update(merged, key, value, force_add=True)
        resolved = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError.from_problems(
            [*mistakes, f"{error.full_key}: {str(error.msg).splitlines()[0]}"], where=where
        ) from error
    structured = OmegaConf.structured(RunConfig)
    mistakes += assign(structured, resolved if isinstance(resolved, dict) else {})
    return Draft(cast(RunConfig, OmegaConf.to_object(structured)), tuple(mistakes), where)
