"""What each stage of a recipe takes from which other, and so what its result depends on.

A stage's fingerprint covers its name, the settings it declares, the fingerprints of what it consumes and, where it
reads text, the text. So all fingerprints of a recipe are known before anything runs: same inputs and same settings
give the same result, and a change shows in everything that follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from dynaconv.artifacts import manifest
from dynaconv.artifacts.fingerprint import difference, fingerprint, flatten
from dynaconv.artifacts.run import slot
from dynaconv.config import RunConfig
from dynaconv.pipeline import registry
from dynaconv.pipeline.stage import Stage

SOURCE = "source"
SOURCE_KINDS = ("parent", "dense")  # what the source is before any stage has run
DATA_FIELD = "data.content"
# Where text lies; what counts is its content, which has a digest of its own.
LOCATIONS = ("data.train", "data.validation")


@dataclass(frozen=True)
class Link:
    """One stage in its place in the recipe.

    Attributes:
        stage: The stage.
        position: From 1.
        inputs: Who made what it consumes, by kind: a stage's name or ``source``.
        fields: Everything its result depends on, by dotted name.
        config: The resolved settings it declares, nested as in the recipe.
    """

    stage: Stage
    position: int
    inputs: Mapping[str, str]
    fields: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.stage.name

    @property
    def slot(self) -> str:
        """Name of its folder in the run."""
        return slot(self.position, self.stage.name)

    @property
    def fingerprint(self) -> str:
        """Hash of ``fields``."""
        return fingerprint(self.fields)


def order_problems(stages: Sequence[Stage]) -> list[str]:
    """Why ``stages`` cannot run in this order: which lacks what, and which stage makes it. Empty when they can."""
    found: list[str] = []
    made = dict.fromkeys(SOURCE_KINDS, SOURCE)
    outdated: dict[str, str] = {}
    for stage in stages:
        for kind in stage.consumes:
            if kind in outdated:
                maker, by = made[kind], outdated[kind]
                found.append(
                    f"{stage.name} needs {kind}, but {by} makes what {maker} made out of date; put {maker} after {by}"
                )
            elif kind not in made:
                later = [other.name for other in stages if other.produces == kind]
                makers = later or registry.makers(kind)
                how = f"put {later[0]} before {stage.name}" if later else "add it to the stages"
                advice = f"which {' or '.join(makers)} makes: {how}" if makers else "which no stage makes"
                found.append(f"{stage.name} needs {kind}, {advice}")
        outdated |= {kind: stage.name for kind in stage.invalidates if kind in made}
        outdated.pop(stage.produces, None)
        made[stage.produces] = stage.name
    return found


def chain(config: RunConfig, stages: Sequence[Stage], source: str, text: str) -> list[Link]:
    """The recipe's stages with all that their results depend on.

    Args:
        config: The resolved recipe.
        stages: Its stages, in an order that :func:`order_problems` finds nothing against.
        source: Digest of the dense checkpoint.
        text: Digest of the text, for the stages that read text.
    """
    links: list[Link] = []
    made = dict.fromkeys(SOURCE_KINDS, (SOURCE, source))
    for position, stage in enumerate(stages, 1):
        values = sections(config, stage)
        fields: dict[str, Any] = {"stage": stage.name, "schema": manifest.SCHEMA, **_settings(values, stage)}
        if "data" in stage.sections:
            fields[DATA_FIELD] = text
        for kind in stage.consumes:
            fields[f"inputs.{kind}"] = ":".join(made[kind])
        link = Link(stage, position, {kind: made[kind][0] for kind in stage.consumes}, fields, values)
        made[stage.produces] = (stage.name, link.fingerprint)
        links.append(link)
    return links


def sections(config: RunConfig, stage: Stage) -> dict[str, Any]:
    """The resolved settings that ``stage`` declares, nested as in the recipe."""
    values = {name: getattr(config, name) for name in stage.sections}
    return {name: asdict(value) if is_dataclass(value) else value for name, value in values.items()}  # type: ignore[arg-type]


def _settings(values: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
    """Those of ``values`` that change what ``stage`` makes, by dotted name."""
    without = (*stage.unfingerprinted, *LOCATIONS)
    return {name: value for name, value in flatten(values).items() if name not in without}


def changes(fields: Mapping[str, Any], config: Mapping[str, Any], link: Link) -> list[str]:
    """Why something is not what ``link`` asks for: ``"field: then -> now"`` each.

    Args:
        fields: Everything it depends on, by dotted name.
        config: Its settings, nested as in the recipe.
        link: The stage in its place now.
    """
    found = difference(fields, link.fields)
    if any(line.startswith(DATA_FIELD) for line in found):
        then, now = flatten(config), flatten(link.config)
        found += difference({name: then.get(name) for name in LOCATIONS}, {name: now.get(name) for name in LOCATIONS})
    return found
