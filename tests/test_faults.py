"""The table of what was tried is what the tests' marks say."""

from __future__ import annotations

from pathlib import Path

import faults
import pytest


def test_the_page_is_what_the_marks_say() -> None:
    assert faults.PAGE.read_text() == faults.page(), "write it anew: python tests/faults.py"


def test_rows_differ_and_every_area_has_some() -> None:
    rows = faults.rows()
    assert len({(row.area, row.given) for row in rows}) == len(rows)
    assert {row.area for row in rows} == set(faults.AREAS)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("@pytest.mark.fault('Files', 'a')\ndef test_a(): ...", "expected fault"),
        ("@pytest.mark.fault('Other', 'a', 'b')\ndef test_a(): ...", "expected fault"),
        ("@pytest.mark.fault('Files', 'a', SAID)\ndef test_a(): ...", "expected fault"),
        ("@pytest.mark.fault('Files', 'a|b', 'c')\ndef test_a(): ...", "no '|'"),
        ("@pytest.mark.fault('Files', 'a', 'b')\ndef helper(): ...", "above a test"),
    ],
)
def test_a_mark_that_is_no_row_is_refused(
    source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_it.py").write_text(source)
    monkeypatch.setattr(faults, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"test_it.py.*" + reason.replace("|", r"\|")):
        faults.rows()
