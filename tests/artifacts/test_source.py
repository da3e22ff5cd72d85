"""Where a source is, and that its digest follows what matters and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dynaconv.artifacts.source import digest, resolve
from dynaconv.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (
        "config.json",
        "model-00001-of-00001.safetensors",
        "tokenizer.json",
        "vocab.txt",
        "chat_template.jinja",
    ):
        (folder / name).write_text(name)
    return folder


def test_local_folder(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(checkpoint)) == checkpoint
    monkeypatch.chdir(checkpoint.parent)
    assert resolve("model") == checkpoint
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert resolve("~/model") == checkpoint


@pytest.mark.parametrize("source", ["", "./nowhere", "/nowhere/at/all", "a/b/c", "spaces in it"])
def test_no_such_folder(source: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(source)


def test_a_file_is_no_source(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(str(checkpoint / "config.json"))


@pytest.mark.skipif(os.environ.get("HF_HUB_OFFLINE") != "1", reason="would ask the network")
def test_hub_name_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="hub cannot be reached") as caught:
        resolve("nobody-at-all/no-such-model")
    assert "HF_HUB_OFFLINE" in str(caught.value)


def test_hub_name_downloads_what_matters(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = {}

    def snapshot_download(name: str, **settings: object) -> str:
        asked.update(settings, name=name)
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("org/name") == checkpoint
    assert asked["name"] == "org/name"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not {"*", "*.bin", "*.pt"} & set(asked["allow_patterns"])
    next(checkpoint.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="no safetensors"):
        resolve("org/name")


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00001.safetensors", "tokenizer.json", "vocab.txt"])
def test_digest_follows_content_names_and_presence(checkpoint: Path, name: str) -> None:
    before = digest(checkpoint)
    path = checkpoint / name
    content = path.read_text()
    path.write_text(content.upper())  # same size
    assert digest(checkpoint) != before
    path.write_text(content)
    assert digest(checkpoint) == before
    path.rename(checkpoint / f"x{name}")
    assert digest(checkpoint) != before
    (checkpoint / f"x{name}").unlink()
    assert digest(checkpoint) != before


def test_digest_ignores_the_rest(checkpoint: Path) -> None:
    before = digest(checkpoint)
    for name in ("README.md", "pytorch_model.bin", "dial.json", "consolidated.safetensors", ".gitattributes"):
        (checkpoint / name).write_text("anything")
    (checkpoint / "deep").mkdir()
    (checkpoint / "deep" / "x.json").write_text("{}")
    os.utime(checkpoint / "config.json", (1, 1))
    assert digest(checkpoint) == before
    assert digest(checkpoint.rename(checkpoint.parent / "moved")) == before


def test_digest_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        digest(tmp_path / "nowhere")
