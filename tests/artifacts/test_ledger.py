"""Fingerprints tell apart what differs and name it; the manifest comes back as it was, or is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fake_stages import sample_record as record
from hypothesis import given
from hypothesis import strategies as st

from dynaconv.artifacts.fingerprint import difference, fingerprint, flatten
from dynaconv.artifacts.manifest import MANIFEST_FILE, Manifest
from dynaconv.config import RunConfig
from dynaconv.errors import ArtifactError

leaf = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
fields = st.dictionaries(st.text(min_size=1), leaf | st.lists(leaf))


@given(fields)
def test_fingerprint_ignores_order_only(content: dict) -> None:
    assert fingerprint(content) == fingerprint(dict(reversed(list(content.items()))))
    assert fingerprint(content) == fingerprint(json.loads(json.dumps(content)))
    assert fingerprint({**content, "one more": 1}) != fingerprint(content)


@given(fields, fields)
def test_difference_is_empty_exactly_when_fingerprints_agree(old: dict, new: dict) -> None:
    assert (difference(old, new) == []) == (fingerprint(old) == fingerprint(new))
    assert difference({"x": 1}, {"x": True}) == ["x: 1 -> true"]


def test_difference_names_fields_and_shortens_hashes() -> None:
    a, b = "a" * 64, "b" * 64
    old = {"blocks": 8, "x": f"carve:{a}", "gone": "text", "same": [1]}
    new = {"blocks": 16, "x": f"finetune:{b}", "came": b, "same": [1]}
    assert difference(old, new) == [
        "blocks: 8 -> 16",
        f"came: (absent) -> {b[:12]}",
        "gone: text -> (absent)",
        f"x: carve:{a[:12]} -> finetune:{b[:12]}",
    ]


def test_flatten_reaches_every_leaf_of_a_recipe() -> None:
    flat = flatten(RunConfig())
    assert flat["blocks"] is None
    assert flat["data.train"] == ["python-stdlib"]
    assert flat["finetune.learning_rate"] == 6e-4
    assert not any(isinstance(value, dict) for value in flat.values())


def test_manifest_round_trip(tmp_path: Path) -> None:
    manifest = Manifest(stages=[record("profile", "01-profile"), replace(record(), superseded=True)])
    manifest.publishing = record("finetune", "03-finetune")
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert manifest.record("profile") == record("profile", "01-profile")
    assert manifest.record("export") is None


def test_newer_manifest_is_refused(tmp_path: Path) -> None:
    Manifest().save(tmp_path)
    content = json.loads((tmp_path / MANIFEST_FILE).read_text())
    (tmp_path / MANIFEST_FILE).write_text(json.dumps({**content, "schema": 2, "stages": "of another shape"}))
    with pytest.raises(ArtifactError, match="newer dynaconv") as caught:
        Manifest.load(tmp_path)
    assert "schema 2" in str(caught.value)
    assert "upgrade" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"schema": 1}',
        '{"schema": "1"}',
        '{"schema": 1, "id": "x", "publishing": null, "stages": [{}]}',
    ],
)
def test_damaged_manifest(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST_FILE).write_text(content)
    with pytest.raises(ArtifactError, match="damaged"):
        Manifest.load(tmp_path)
