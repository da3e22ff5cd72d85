"""The held-out side depends on content alone, never overlaps the other, and is never silently empty."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynaconv.config import DataConfig
from dynaconv.data.split import FEW, PIECE, split_documents, split_sources
from dynaconv.errors import DataError


def sides(config: DataConfig) -> tuple[list[str], list[str]]:
    found = list(split_documents(config))
    return [d.text for held, d in found if not held], [d.text for held, d in found if held]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three times as many documents as count as few, a tenth of them twice."""
    path = tmp_path / "many"
    path.mkdir()
    for i in range(3 * FEW):
        (path / f"{i}.txt").write_text(f"document {i % (3 * FEW * 9 // 10)}")
    return path


def test_share_is_held_out_and_disjoint_even_for_duplicates(folder: Path) -> None:
    train, held = sides(DataConfig(train=[str(folder)], validation_share=0.2))
    assert len(train) + len(held) == 3 * FEW
    assert 0.1 * 3 * FEW < len(held) < 0.3 * 3 * FEW
    assert not set(train) & set(held)


def test_a_document_keeps_its_side_whatever_lies_beside_it(folder: Path) -> None:
    train, held = sides(DataConfig(train=[str(folder)]))
    shutil.copytree(folder, folder / "again")
    (folder / "0.txt").write_text("something else")
    more_train, more_held = sides(DataConfig(train=[str(folder)]))
    assert set(train) <= set(more_train) | {"document 0"}
    assert set(held) <= set(more_held) | {"document 0"}


def test_a_larger_share_holds_out_more_of_the_same(folder: Path) -> None:
    _, small = sides(DataConfig(train=[str(folder)], validation_share=0.05))
    _, large = sides(DataConfig(train=[str(folder)], validation_share=0.3))
    assert set(small) < set(large)


def test_own_validation_is_whole_and_its_documents_are_not_trained_on(folder: Path) -> None:
    (folder.parent / "own.txt").write_text("document 3<|endoftext|>only here")
    train, held = sides(DataConfig(train=[str(folder)], validation=[str(folder.parent / "own.txt")]))
    assert held == ["document 3", "only here"]
    assert len(set(train)) == 3 * FEW * 9 // 10 - 1
    assert "document 3" not in train


def test_one_long_text_is_cut_and_shared_out(text_file: Path) -> None:
    train, held = sides(DataConfig(train=[str(text_file)]))
    text = text_file.read_text()
    assert held
    assert all(piece in text for piece in train + held)
    assert abs(len("".join(train + held)) - len(text)) < 100  # nothing but empty pieces is lost
    share = len("".join(held)) / len(text)
    assert 0.02 < share < 0.1
    assert min(map(len, train + held)) >= PIECE
    assert sides(DataConfig(train=[str(text_file)])) == (train, held)


def test_few_identical_pieces_stay_on_one_side(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"text {i % 5}")
    train, held = sides(DataConfig(train=[str(tmp_path)], validation_share=0.4))
    assert (len(train), len(held)) == (6, 4)
    assert not set(train) & set(held)


def test_nothing_is_held_out_where_there_is_but_one_piece_or_no_share(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "one.txt").write_text("one")
    assert sides(DataConfig(train=[str(tmp_path / "one.txt")])) == (["one"], [])
    assert sides(DataConfig(train=[str(folder)], validation_share=0.0))[1] == []


def test_the_standard_library_splits_at_its_share() -> None:
    train, held = sides(DataConfig())
    assert len(train) > 300
    assert 0.02 < len(held) / len(train + held) < 0.1
    assert not set(train) & set(held)


def test_missing_validation_text_is_an_error(folder: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        sides(DataConfig(train=[str(folder)], validation=["./gone.txt"]))


TEXTS = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\x00\ufeff"), max_size=8), max_size=30)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=TEXTS, share=st.floats(0.05, 0.9), many=st.booleans(), weighted=st.booleans())
def test_no_text_is_on_both_sides_whatever_it_is_read_from(
    tmp_path: Path, texts: list[str], share: float, many: bool, weighted: bool
) -> None:
    from pyarrow import parquet, schema, string, table

    texts = [text for text in texts if text.strip()] + ([f"text {i}" for i in range(FEW)] if many else ["text"])
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    parquet.write_table(table({"text": texts[::-1]}, schema([("text", string())])), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("<|endoftext|>".join(texts[::2]), encoding="utf-8", newline="")
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.parquet", "c.txt")]
    config = DataConfig(train=paths, validation_share=share, weights=[1, 2, 3] if weighted else None)
    sources = [list(source.documents) for source in split_sources(config)]
    assert len(sources) == (3 if weighted else 1)
    held_out = {side.document.text for source in sources for side in source if side.held_out}
    train = {side.document.text for source in sources for side in source if not side.held_out}
    assert not held_out & train
    assert held_out | train == set(texts)
    assert bool(held_out) == (len(set(texts)) > 1) or many
    assert {side.document.text for side in split_documents(config) if side.held_out} == held_out
    own = dataclasses.replace(config, validation=[paths[2]])
    kept = {side.document.text for source in split_sources(own) for side in source.documents if not side.held_out}
    assert kept == set(texts) - set(texts[::2])
