"""The page of results: a row for each table of the papers, from the stored results alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mpd_gym.atomic import atomic_path
from mpd_gym.errors import DataError
from studies import STUDIES, read_study
from studies.report import Finding, Ordering, Report, Table, first_sentence, read_page, write_page
from studies.results import Results

__all__ = ["write_summary"]

INTRODUCTION = """\
# Results

What the papers' tables say, and what came out on this package's environments. Where a paper used
another task, values are not comparable, only orderings are. *Holds*: ahead as published, and the
95 % intervals over trials are apart; *not apart*: they overlap; *does not hold*: the other way
round. Each page has the difference trial by trial as well, which often tells more. Intervals do not
count how other trainings would differ; each page says how many there are.

The paper's MPDiffuser is **Algorithm 1**: published values are of Algorithm 1 in every row. This
package's default is a **level-matched** form of it, whose two models see the same noise level.
"""
OUTRODUCTION = """
`python -m studies NAME` trains and measures one study, `--list` lists all with their time, and
`--report` writes these pages from the stored measurements."""
BY_HAND = ("defect", "first-try")
"""Pages of probes, whose measurements are not stored."""


def write_summary(folder: Path) -> Path:
    """Write the page of results, and the pages and figures that it links to.

    Args:
        folder: Of ``NAME.json`` files of studies and what was found, ``NAME.finding.md``.

    Returns:
        The page: the folder's name with ``.md``, beside it.

    Raises:
        DataError: If the folder does not exist or holds no result, or a file is damaged.
    """
    if not folder.is_dir():
        raise DataError("there is no such folder of results", source=str(folder))
    reports: dict[str, Report] = {}
    absent: dict[str, str] = {}
    for name, study in STUDIES.items():
        if not (folder / f"{name}.json").exists():
            absent[name] = "not run"
            continue
        Results.read(folder / f"{name}.json")  # one that is damaged is no study to leave out
        try:
            report, results = read_study(name, folder)
        except DataError as error:
            absent[name] = error.problem
            continue
        write_page(folder, name, study, report, results)
        reports[name] = report
    lines = _lines(reports, absent, folder)
    if not reports:
        raise DataError("there is no result of a study, NAME.json; run one", source=str(folder))
    page = folder.with_name(f"{folder.name}.md")
    with atomic_path(page) as temporary:
        temporary.write_text("\n".join([*lines, ""]))
    return page


def _lines(reports: dict[str, Report], absent: dict[str, str], folder: Path) -> list[str]:
    rows = {
        name: [one for one in report.orderings if one.table] for name, report in reports.items()
    }
    heads = ("table", "what is compared", "published", "here", "verdict", "study")
    published = [
        row for name, orderings in rows.items() for row in _rows(orderings, _link(name, folder))
    ]
    published.sort(key=lambda row: _place(row[0]))
    others = [
        [_link(name, folder), _sentence(folder, name)]
        for name, orderings in rows.items()
        if not orderings
    ]
    for name in BY_HAND:
        if (folder / f"{name}.md").exists():
            others.append([f"{_link(name, folder)}, by hand", _by_hand(folder / f"{name}.md")])
    lines = INTRODUCTION.splitlines()
    if published:
        lines += Table("", heads, published).lines()
    if others:
        lines += ["", "## Beyond the tables", *Table("", ("study", "found"), others).lines()]
    if absent:
        lines += ["", "Not here: " + "; ".join(f"{name} ({why})" for name, why in absent.items())]
    return [*lines, *OUTRODUCTION.splitlines()]


def _rows(orderings: Sequence[Ordering], link: str) -> list[list[str]]:
    """A row for each statement about a table, with all the places where it was measured."""
    groups: dict[tuple[str, str], list[Ordering]] = {}
    for one in orderings:
        groups.setdefault((one.table, one.statement), []).append(one)
    return [
        [
            table,
            statement,
            "; ".join(dict.fromkeys(one.published for one in group)),
            "; ".join(map(_here, group)),
            _verdict([one.verdict for one in group]),
            link,
        ]
        for (table, statement), group in groups.items()
    ]


def _here(one: Ordering) -> str:
    values = f"{one.winner.short} : {one.loser.short}"
    return f"{one.place}: {values}" if one.place else values


def _verdict(verdicts: Sequence[str]) -> str:
    counts = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
    if len(counts) == 1:
        return verdicts[0]
    return ", ".join(f"{verdict} ({count} of {len(verdicts)})" for verdict, count in counts.items())


def _link(name: str, folder: Path) -> str:
    return f"[{name}]({folder.name}/{name}.md)"


def _sentence(folder: Path, name: str) -> str:
    finding = Finding.read(folder / f"{name}.finding.md")
    return "" if finding is None else finding.sentence


def _by_hand(page: Path) -> str:
    """Title of a page that is written by hand, and the first sentence of what was found."""
    title, mark, found = read_page(page).partition("**What was found.** ")
    if not title.startswith("# ") or not mark:
        raise DataError("expected a title and '**What was found.** '", source=str(page))
    sentence = first_sentence(found.replace("\n", " "))
    return f"{title.splitlines()[0].removeprefix('# ')}: {sentence}"


def _place(table: str) -> tuple[str, int]:
    """Tables in order, then figures: ``Table 8`` before ``Table 10``."""
    kind, number = table.split()[:2]
    return {"Table": "a", "Fig.": "b"}[kind], int(number)
