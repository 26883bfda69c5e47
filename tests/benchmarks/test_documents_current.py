"""The tables in README.md, RESULTS.md and KERNELS.md are those of the raw files beside them: none is out of date."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

import pytest

from benchmarks import tables
from benchmarks.harness import RESULTS

FILES = (tables.PAGE, tables.KERNELS, tables.README)


def _changes(path: Path, text: str) -> list[str]:
    """Lines of `path` that would change, were `text` written."""
    lines = difflib.unified_diff(path.read_text("utf-8").splitlines(), text.splitlines(), "committed", "made", n=0,
                                 lineterm="")
    return list(lines)[:12]


def test_all_three_are_made_from_raw_files() -> None:
    assert set(tables.documents()) == set(FILES)
    readme = tables.README.read_text("utf-8")
    for kind in ("train", "peers", "nf4"):
        assert tables.fill(readme, kind, "a table") != readme, f"README.md lacks the place of the {kind} table"
        assert "not measured yet" not in readme


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_tables_are_those_of_the_raw_files(path: Path) -> None:
    assert _changes(path, tables.documents()[path]) == [], "run: python -m benchmarks.tables"


def test_a_figure_that_was_changed_by_hand_is_found(tmp_path: Path) -> None:
    copies = [Path(shutil.copy(path, tmp_path)) for path in FILES]
    for path in copies:
        path.write_text(path.read_text("utf-8").replace("1", "7"), "utf-8")
    made = tables.documents(RESULTS, *copies)
    assert [path for path in copies if not _changes(path, made[path])] == []
