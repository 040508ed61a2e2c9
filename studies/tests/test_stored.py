"""What the repository stores: pages follow from the results, and methods have one name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from studies import STUDIES, read_study
from studies.report import Finding, page


@pytest.mark.parametrize("name", STUDIES)
def test_a_page_follows_from_the_stored_results(name: str, results: Path) -> None:
    text = page(results, name, STUDIES[name], *read_study(name, results))
    assert text == (results / f"{name}.md").read_text(), "run python -m studies --report"
    finding = Finding.read(results / f"{name}.finding.md")
    assert finding is not None and finding.sentence.endswith(".")


def test_tables_call_no_variant_by_the_papers_name_alone(results: Path) -> None:
    alone = re.compile(r"MPDiffuser(?! \((level-matched, ours|Algorithm 1|resampled)\))")
    for path in (*(results / f"{name}.md" for name in STUDIES), results.with_suffix(".md")):
        rows = [line for line in path.read_text().splitlines() if line.startswith("| ")]
        assert rows and not [row for row in rows if alone.search(row)], path.name
