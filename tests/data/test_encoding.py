"""Worker processes change nothing but the time, hand errors on, and end with whoever started them."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynaconv.data import encoding
from dynaconv.data.encoding import Encoder, Worker, encode_in_order
from dynaconv.data.readers import Document
from dynaconv.errors import DataError


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "ALONE", 1)


def batches(count: int = 7) -> Iterator[tuple[int, list[Document]]]:
    for i in range(count):
        yield i, [Document(f"{i}.{j}", f"document {i} {j} " * (j + 1)) for j in range(i % 3 + 1)]


def test_workers_give_the_same_tokens_in_the_same_order(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, longest=50, vocabulary=257)
    alone = list(encode_in_order(encoder, batches(), workers=1))
    together = list(encode_in_order(encoder, batches(), workers=2))
    assert [label for label, _ in together] == list(range(7))
    for (_, one), (_, other) in zip(alone, together, strict=True):
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.lengths, other.lengths)
        assert one.documents == other.documents


def test_an_error_in_a_worker_is_told_here(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, vocabulary=50)
    documents = [(0, [Document("a", "!")]), *((i, [Document("b", "zzz")]) for i in range(1, 4))]
    with pytest.raises(DataError, match=r"not this model's[\s\S]*below 50"):
        list(encode_in_order(encoder, iter(documents), workers=2))


def test_a_killed_worker_is_one_clear_message(tokenizer: Any) -> None:
    with Worker(pickle.dumps(Encoder(tokenizer))) as worker:
        worker.process.kill()
        worker.process.wait()
        with pytest.raises(DataError, match=r"was killed[\s\S]*exit status -9"):
            worker.send([Document("a", "a" * 10**6)])
            worker.result()


def test_a_worker_ends_when_nobody_can_send_to_it_any_more(tokenizer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    worker = Worker(pickle.dumps(Encoder(tokenizer)))
    worker.send([Document("a", "text")])
    assert len(worker.result().tokens) == 5
    assert worker.process.stdin is not None
    worker.process.stdin.write(pickle.dumps([Document("b", "text")])[:-5])  # killed in the middle of a batch
    worker.process.communicate(timeout=60)  # closes the pipe, as the kernel does then
    assert worker.process.returncode == 0
    assert "Traceback" not in capfd.readouterr().err


def test_a_worker_imports_nothing_from_the_current_folder(
    tokenizer: Any, hostile_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hostile_folder)
    with Worker(pickle.dumps(Encoder(tokenizer))) as worker:
        worker.send([Document("a", "text")])
        assert len(worker.result().tokens) == 5
    assert not (hostile_folder / "executed").exists()


def test_what_cannot_be_sent_stays_here(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "Worker", lambda _: pytest.fail("started a process"))
    encoder = Encoder(lambda texts, **settings: tokenizer(texts, **settings))
    assert len(list(encode_in_order(encoder, batches(), workers=2))) == 7


def test_little_text_starts_no_process(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "Worker", lambda _: pytest.fail("started a process"))
    monkeypatch.setattr(encoding, "ALONE", 7)
    assert len(list(encode_in_order(Encoder(tokenizer), batches(), workers=2))) == 7


def test_a_script_without_a_guard_may_use_workers(tokenizer_folder: Any, tmp_path: Any) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"""
from dynaconv.data import encoding
from dynaconv.data.readers import Document
from dynaconv.data.tokenizer import load_tokenizer
print("begun")
encoding.ALONE = 1
batches = ((i, [Document("a", "text")]) for i in range(4))
found = encoding.encode_in_order(encoding.Encoder(load_tokenizer({str(tokenizer_folder)!r})), batches, workers=2)
print(sum(len(encoded.tokens) for _, encoded in found))
""")
    told = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, env=os.environ)
    assert told.stdout.split() == ["begun", "20"]
