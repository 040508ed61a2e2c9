"""Links in the documentation lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "mpd_gym/pretrained/*.md")
    for path in ROOT.glob(pattern)
)


def test_the_pages_are_found() -> None:
    assert {"README.md", "docs/guide.md", "docs/results.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    path = ROOT / page
    links = re.findall(r"\]\((?!https?:)([^)\s]*)\)", path.read_text())
    lost = [link for link in links if not _there(path, *link.partition("#")[::2])]
    assert not lost


def _there(page: Path, name: str, heading: str) -> bool:
    target = page.parent / name if name else page
    if not heading:
        return target.exists()
    titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
    return heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
