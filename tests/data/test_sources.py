"""Every kind of data spec finds its text, in an order that is the same every time and fair to every file."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynaconv.config import DataConfig
from dynaconv.data import hub, readers
from dynaconv.data.readers import LOOK_AHEAD, MARKER, RANGE, parts_of, read_part
from dynaconv.data.sources import documents, files
from dynaconv.errors import DataError

CONFIG = DataConfig()


def texts(spec: str | list[str], config: DataConfig = CONFIG, skipped: list[str] | None = None) -> list[str]:
    return [document.text for document in documents(spec, config, skipped=skipped)]


def write(folder: Path, **contents: str) -> None:
    for name, content in contents.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


def test_a_text_file_is_one_document_or_split_at_markers(tmp_path: Path) -> None:
    write(tmp_path, a_dot_txt="one\r\ntwo", b_dot_txt=f"first{MARKER}\nsecond{MARKER}  \n{MARKER}third")
    assert texts(str(tmp_path / "a.txt")) == ["one\ntwo"]
    assert texts(str(tmp_path / "b.txt")) == ["first", "\nsecond", "third"]


def test_a_folder_is_read_by_suffix_without_hidden_files(tmp_path: Path) -> None:
    write(tmp_path, a_dot_txt="a", deep__er__b_dot_md="b", _dot_git__c_dot_txt="c", _dot_d_dot_txt="d", e_dot_bin="e")
    assert sorted(texts(str(tmp_path))) == ["a", "b"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path, text__a_dot_txt="a", outside__b_dot_txt="b")
    (tmp_path / "text" / "loop").symlink_to(tmp_path / "text")
    (tmp_path / "text" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "text" / "dangling.txt").symlink_to(tmp_path / "nowhere")
    assert sorted(texts(str(tmp_path / "text"))) == ["a", "b"]


@pytest.mark.parametrize("absolute", [True, False])
def test_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absolute: bool) -> None:
    write(tmp_path, x__a_dot_log="a", x__y__z__b_dot_log="b", x__y__c_dot_txt="c")
    monkeypatch.chdir(tmp_path)
    prefix = f"{tmp_path}/" if absolute else ""
    assert sorted(texts(f"{prefix}x/**/*.log")) == ["a", "b"]
    assert texts(f"{prefix}x/*.log") == ["a"]
    assert [name for name, _ in files(f"{prefix}x/**/*.log") or []] == ["a.log", "y/z/b.log"]


def test_exclude_patterns_match_name_or_path(tmp_path: Path) -> None:
    write(tmp_path, a__x_dot_txt="1", b__x_dot_txt="2", b__y_dot_txt="3")
    assert sorted(texts(str(tmp_path), DataConfig(exclude=["y.txt"]))) == ["1", "2"]
    assert sorted(texts(str(tmp_path), DataConfig(exclude=["b/*"]))) == ["1"]
    assert sorted(texts(str(tmp_path), DataConfig(exclude=[f"{tmp_path}/a*"]))) == ["2", "3"]


def test_jsonl_reads_a_field(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"t{i}", "other": f"o{i}"}) for i in range(3)]
    write(tmp_path, a_dot_jsonl="\n".join([lines[0], "", *lines[1:], json.dumps({"text": None, "other": "o3"})]))
    assert texts(str(tmp_path / "a.jsonl")) == ["t0", "t1", "t2"]
    assert texts(str(tmp_path), DataConfig(field="other")) == ["o0", "o1", "o2", "o3"]


def test_parquet_reads_a_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import parquet, table

    rows = {"text": [f"t{i}" for i in range(10)], "n": list(range(10))}
    parquet.write_table(table(rows), tmp_path / "a.parquet", row_group_size=3)
    assert sorted(texts(str(tmp_path / "a.parquet"))) == sorted(rows["text"])
    monkeypatch.setattr(readers, "ROWS", 2)
    assert sorted(texts(str(tmp_path / "a.parquet"))) == sorted(rows["text"])
    with pytest.raises(DataError, match="field 'n' holds no text"):
        texts(str(tmp_path), DataConfig(field="n"))
    with pytest.raises(DataError, match=r"no field 'body'[\s\S]*n, text"):
        texts(str(tmp_path), DataConfig(field="body"))
    (tmp_path / "b.parquet").write_text("not parquet")
    with pytest.raises(DataError, match="not a readable parquet file"):
        texts(str(tmp_path / "b.parquet"))


def test_dataset_is_streamed_from_a_local_builder(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": f"t{i}"}) for i in range(20))
    write(tmp_path, train_dot_jsonl=lines, test_dot_jsonl=json.dumps({"text": "held"}))
    read = [document.text for document in hub.documents(str(tmp_path), CONFIG, "train")]
    assert sorted(read) == sorted(f"t{i}" for i in range(20))
    assert read == [document.text for document in hub.documents(str(tmp_path), CONFIG, "train")]
    assert [document.text for document in hub.documents(f"{tmp_path}:test", CONFIG, "train")] == ["held"]
    with pytest.raises(DataError, match=r"no field 'body'[\s\S]*fields text"):
        list(hub.documents(str(tmp_path), DataConfig(field="body"), "train"))
    with pytest.raises(DataError, match="cannot be read"):
        list(hub.documents(str(tmp_path), CONFIG, "nosplit"))


def test_no_more_of_a_dataset_is_read_than_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SHUFFLE", 10)
    folder = tmp_path / "shards"
    for shard in range(30):
        lines = [json.dumps({"text": f"{shard}.{i}"}) for i in range(50)]
        write(folder, **{f"train_{shard}_dot_jsonl": "\n".join(lines)})
    first = [document.text for document in itertools.islice(hub.documents(str(folder), CONFIG, "train"), 30)]
    assert len(set(first)) == 30
    untouched = {str(shard) for shard in range(30)} - {text.split(".")[0] for text in first}
    assert len(untouched) >= 15
    for shard in untouched:
        write(folder, **{f"train_{shard}_dot_jsonl": "not json"})
    stream = hub.documents(str(folder), CONFIG, "train")
    assert [document.text for document in itertools.islice(stream, 30)] == first
    with pytest.raises(DataError, match="cannot be read"):
        list(stream)


def test_unknown_dataset_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"no file or folder 'nobody/nothing-here'[\s\S]*data=python-stdlib"):
        texts("nobody/nothing-here")


@pytest.mark.parametrize("spec", ["missing.txt", "./missing", "/no/such/folder", "a/b/c", "no/*.txt"])
def test_missing_paths_are_not_looked_up_as_datasets(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "documents", lambda *_: pytest.fail("went to the hub"))
    with pytest.raises(DataError):
        texts(spec)


def test_nothing_found_says_what_was_expected(tmp_path: Path) -> None:
    write(tmp_path, a_dot_bin="a")
    with pytest.raises(DataError, match=r"no text found[\s\S]*\.md"):
        texts(str(tmp_path))
    with pytest.raises(DataError, match="excluded"):
        texts(str(tmp_path / "*.bin"), DataConfig(exclude=["*"]))


def test_files_that_are_not_text_are_left_out_and_named(tmp_path: Path) -> None:
    write(tmp_path, a_dot_txt="fine")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    skipped: list[str] = []
    assert texts(str(tmp_path), skipped=skipped) == ["fine"]
    assert sorted(skipped) == ["binary.txt", "latin.txt"]
    with pytest.raises(DataError, match="not UTF-8"):
        texts(str(tmp_path / "latin.txt"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 3"),
        ("[1]", "no JSON object"),
        ('{"body": "x"}', "fields body"),
        ('{"text": 3}', "holds no text"),
    ],
)
def test_bad_records(tmp_path: Path, line: str, message: str) -> None:
    good = json.dumps({"text": "x"})
    write(tmp_path, a_dot_jsonl="\n".join([good, good, line, good]))
    with pytest.raises(DataError, match=message):
        texts(str(tmp_path / "a.jsonl"))


def test_the_standard_library_is_there_and_is_real_text() -> None:
    found = dict(files("python-stdlib") or [])
    assert len(found) > 200
    assert {"argparse.py", "json/decoder.py"} <= set(found)
    parts = {part for name in found for part in Path(name).parts}
    assert not parts & {"test", "tests", "idlelib", "site-packages", "encodings", "__pycache__"}
    assert sum(path.stat().st_size for path in found.values()) > 4_000_000


def test_order_is_the_same_every_time_and_not_the_alphabet(tmp_path: Path) -> None:
    names = [f"{i:03}" for i in range(50)]
    for name in names:
        (tmp_path / f"{name}.txt").write_text(name)
    first = texts(str(tmp_path))
    assert first == texts(str(tmp_path))
    assert sorted(first) == names != first
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "-moved"))
    assert texts(str(moved)) == first


def test_several_specs_are_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, a__1_dot_txt="a1", a__2_dot_txt="a2", b__1_dot_txt="b1")
    rows = [hub.Document(f"d{i}", f"d{i}") for i in range(2)]
    monkeypatch.setattr(hub, "documents", lambda *_: iter(rows))
    mixed = texts([str(tmp_path / "a"), str(tmp_path / "b"), "some/dataset"])
    assert sorted(mixed) == ["a1", "a2", "b1", "d0", "d1"]
    assert [text for text in mixed if text[0] == "d"] == ["d0", "d1"]
    assert mixed[1] == "d0"


def test_reading_is_lazy(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text("x" * 100)
    stream = documents(str(tmp_path), CONFIG)
    next(stream)
    for path in tmp_path.iterdir():
        path.write_text("changed after the first document was read")
    assert sum("changed" in document.text for document in stream) == 19


def read_file(path: Path) -> list[str]:
    return [document.text for part in parts_of(path.name, path) for document in read_part(part, "text")]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 3 * LOOK_AHEAD), min_size=1, max_size=20), seed=st.integers(0, 99))
def test_parts_of_a_large_file_lose_and_double_nothing(tmp_path: Path, sizes: list[int], seed: int) -> None:
    draw = random.Random(seed)
    pieces = ["".join(draw.choices("aé\n漢 ", weights=[6, 1, seed % 3 / 30, 1, 1], k=size)) for size in sizes]
    path = tmp_path / "large.txt"
    path.write_text(MARKER.join(pieces), encoding="utf-8", newline="")
    parts = list(parts_of("large.txt", path))
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == path.stat().st_size
    assert "".join(read_file(path)).replace("\n", "") == "".join(p for p in pieces if p.strip()).replace("\n", "")
    records = tmp_path / "large.jsonl"
    records.write_text("\n".join(json.dumps({"text": piece}) for piece in pieces), encoding="utf-8")
    assert read_file(records) == [piece for piece in pieces if piece.strip()]


def test_documents_near_a_cut_stay_whole(tmp_path: Path) -> None:
    whole = ["x" * 1000 + f"\n{i}" for i in range(3 * RANGE // 1000)]
    path = tmp_path / "dump.txt"
    path.write_text(MARKER.join(whole))
    assert len(list(parts_of("dump.txt", path))) >= 3
    assert read_file(path) == whole
