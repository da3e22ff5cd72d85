"""The check of an exported folder runs in a process that nothing but that folder has a say in."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynaconv.errors import ExportError
from dynaconv.export.check import _clean_process


def test_the_clean_process_imports_nothing_from_the_folder_it_runs_in(hostile_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not load") as caught:  # there is no model, which takes imports to see
        _clean_process(tmp_path / "nothing", tmp_path / "out", 0.5, [1], hostile_folder)
    assert "nothing" in str(caught.value.found)
    assert not (hostile_folder / "executed").exists()
