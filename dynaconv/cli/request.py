"""What a command line asks for: which recipe, with which overrides, on which source, into which run folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dynaconv.artifacts.run import RECIPE_FILE
from dynaconv.config import RunConfig
from dynaconv.errors import ArtifactError, ConfigError
from dynaconv.recipes import DEFAULT, Draft, draft, draft_of, find

RUNS = Path("runs")
DEFAULT_SOURCE = "embedded"
OVERRIDE = re.compile(r"[+~]*[A-Za-z_][\w.]*=")


@dataclass(frozen=True)
class Request:
    """A configuration, what is wrong with it, and the folder of its run.

    Attributes:
        draft: The configuration; its ``source`` is empty where the embedded default is meant.
        run: Folder of the run; it may not exist yet.
    """

    draft: Draft
    run: Path

    @property
    def config(self) -> RunConfig:
        """The configuration, checked or not."""
        return self.draft.config

    def problems(self, until: str | None = None, redo: str | None = None) -> list[str]:
        """Every mistake that shows without the checkpoint, those in the order of stages included."""
        from dynaconv.pipeline.plan import checked_stages

        return [*self.draft.mistakes, *checked_stages(self.config, until, redo)[1]]

    def check(self, until: str | None = None, redo: str | None = None) -> None:
        """Stops where something is wrong.

        Raises:
            ConfigError: Lists every mistake.
        """
        found = self.problems(until, redo)
        if found:
            raise ConfigError.from_problems(found, where=self.draft.where)


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is a run that was begun and knows its recipe."""
    return (folder / RECIPE_FILE).is_file()


def request(
    source: str | None, overrides: Sequence[str] = (), *, recipe: str | None = None, out: Path | None = None
) -> Request:
    """Reads the arguments of ``convert`` and ``plan``.

    Args:
        source: A checkpoint folder, a hub name, or the folder of a run to go on with. ``None``: the folder ``out`` if
            that is a run, else the embedded default.
        overrides: ``KEY=VALUE`` each.
        recipe: Name or file; the run's own, or the default one, when ``None``.
        out: Folder of the run; ``runs/<source>-<recipe>`` when ``None``.

    Raises:
        ConfigError: There is no such recipe, or the arguments contradict each other.
    """
    if source is not None and OVERRIDE.match(source) and not Path(source).exists():
        overrides, source = [source, *overrides], None
    begun = out if source is None else Path(source).expanduser()
    if begun is not None and is_run(begun):
        return _go_on(begun, overrides, recipe=recipe, out=out)
    name = recipe or DEFAULT
    made = draft(name, overrides)
    if source is not None:
        made = _with_source(made, source)
    made.config.source = absolute(made.config.source)
    return Request(made, out or RUNS / f"{_short_name(made.config.source)}-{find(name).name}")


def _go_on(begun: Path, overrides: Sequence[str], *, recipe: str | None, out: Path | None) -> Request:
    """A run that was begun: its own recipe, or ``recipe`` on the run's own source."""
    if out is not None and out.resolve() != begun.resolve():
        raise ConfigError(f"{begun} is a run: it cannot go on in another folder", found=f"--out {out}")
    made = draft_of(begun / RECIPE_FILE, overrides if recipe is None else ())
    if recipe is not None:
        source = made.config.source
        made = draft(recipe, overrides)
        made.config.source = made.config.source or source
    made.config.source = absolute(made.config.source)
    return Request(made, begun)


def _with_source(made: Draft, source: str) -> Draft:
    if made.config.source and made.config.source != source:
        twice = f"two sources are given: {source!r} and source={made.config.source!r}"
        return replace(made, mistakes=(*made.mistakes, twice))
    made.config.source = source
    return made


def request_of(run: Path, overrides: Sequence[str] = ()) -> Request:
    """Reads the arguments of a command for one stage of a run. A new run needs ``source=...`` among ``overrides``.

    Raises:
        ArtifactError: ``run`` is not the folder of a run, and no source is given to begin one with.
    """
    if is_run(run):
        return _go_on(run, overrides, recipe=None, out=None)
    made = draft(DEFAULT, overrides)
    if not made.config.source:
        hint = f"`dynaconv convert SOURCE --out {run}` begins one, or add source=SOURCE"
        raise ArtifactError("not the folder of a run", where=run, expected=f"{RECIPE_FILE} in it", hint=hint)
    made.config.source = absolute(made.config.source)
    return Request(made, run)


def absolute(source: str) -> str:
    """A local folder by its absolute path, so that a run goes on from anywhere; a hub name as it is."""
    folder = Path(source).expanduser()
    return str(folder.resolve()) if source and folder.exists() else source


def _short_name(source: str) -> str:
    last = Path(source).name if source else DEFAULT_SOURCE
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or DEFAULT_SOURCE


def fill_source(config: RunConfig, *, quiet: bool) -> None:
    """Puts the embedded default where no source was given; it is made first if need be."""
    if not config.source:
        from dynaconv.progress import Progress
        from dynaconv.train.defaults import default_source

        with Progress(quiet=quiet) as progress:
            config.source = str(default_source(progress))
