"""The held-out side depends on content alone, never overlaps the other, and is never silently empty."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dynaconv.config import DataConfig
from dynaconv.data.split import FEW, PIECE, split_documents
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
