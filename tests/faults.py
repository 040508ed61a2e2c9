"""The table of what was tried, `docs/faults.md`, from the tests' marks; run me to write it.

A test that proves a row has the mark ``fault(area, given, outcome)``, or a ``pytest.param`` of it
has. The marks are read from the source, so that no test need be imported.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/faults.md"
KILLS = ROOT / "docs/kills.json"  # which `kills.py` wrote
AREAS = (
    "Spaces",
    "Observations and actions",
    "Data",
    "Policies",
    "Callers' functions",
    "Files",
    "Training",
    "Recording",
    "Evaluation",
    "Machine",
)
INTRODUCTION = """\
# What was tried

{count} kinds of input and fault, what happens, and the test that proves it.
`make test-faults` runs these tests, CI all but the heaviest. The table is written from the tests'
marks: `python tests/faults.py`.
"""


class Row(NamedTuple):
    """A kind of input or fault, what happens, and the test, by its node id under `tests`."""

    area: str
    given: str
    outcome: str
    test: str


def rows() -> list[Row]:
    """All rows, by area, then by test."""
    found = [row for path in sorted(ROOT.glob("tests/test_*.py")) for row in _rows(path)]
    return sorted(found, key=lambda row: AREAS.index(row.area))


def page() -> str:
    """The page as the marks have it."""
    found, parts = rows(), [INTRODUCTION]
    for area in AREAS:
        table = [
            f"| {row.given} | {row.outcome} | `{row.test}` |" for row in found if row.area == area
        ]
        if table:
            head = ["| given | what happens | test |", "|---|---|---|"]
            parts.append("\n".join([f"## {area}", "", *head, *table, ""]))
    return "\n".join([*parts, kills()]).format(count=len(found))


def kills() -> str:
    """What many kills did, as it was recorded."""
    found = json.loads(KILLS.read_text())
    names = ("kills", "lost", "left", "different")
    table = [
        f"| {work} | " + " | ".join(f"{counts[name]:,}" for name in names) + " |"
        for work, counts in found["counts"].items()
    ]
    total = sum(counts["kills"] for counts in found["counts"].values())
    head = [
        "| work | kills | a file lost or cut | files left behind | other result after resuming |",
        "|---|---|---|---|---|",
    ]
    said = (
        f"`{found['command']}` at {found['commit']}: {total:,} kills at random moments in "
        f"{found['seconds'] / 60:.0f} minutes. After each, files are checked; then the work goes "
        "on, to its end or to the next kill."
    )
    return "\n".join(["## Kills", "", said, "", *head, *table, ""])


def _rows(path: Path) -> Iterator[Row]:
    tree, seen = ast.parse(path.read_text()), 0
    for test in tree.body:
        if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
            for mark in _marks(test):
                seen += 1
                area, given, outcome = _words(mark, path)
                yield Row(area, given, outcome, f"{path.name}::{test.name}")
    if seen != len(list(_marks(tree))):
        raise ValueError(f"{path.name}: write each mark `fault` above a test or in its parameters")


def _marks(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            holder = node.func.value
            if node.func.attr == "fault" and isinstance(holder, ast.Attribute):
                yield node


def _words(mark: ast.Call, path: Path) -> list[str]:
    words = [word.value for word in mark.args if isinstance(word, ast.Constant)]
    if len(words) != 3 or words[0] not in AREAS or not all(isinstance(w, str) for w in words):
        raise ValueError(
            f"{path.name}, line {mark.lineno}: expected fault(area, given, outcome), three plain "
            f"strings with an area of {AREAS}; got {words}"
        )
    if any(set(word) & set("|{}\n") for word in words):
        raise ValueError(f"{path.name}, line {mark.lineno}: no '|', braces or line breaks")
    return words


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE.relative_to(ROOT)}: {len(rows())} rows")
