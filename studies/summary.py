"""The page of results: every study's tables and orderings, from the stored results alone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from mpd_gym.atomic import atomic_path
from mpd_gym.errors import DataError
from studies import STUDIES, read_study
from studies.report import ORDERING_HEADS, VERDICTS, Report, Table
from studies.results import Results

__all__ = ["write_summary"]

_RELATIVE = re.compile(r"\]\((?!https?:|#)")  # of a link to a file


def write_summary(folder: Path) -> Path:
    """Write the page of results, and the reports and figures that it shows.

    Args:
        folder: Of ``NAME.json`` files of studies. A file ``NAME.cause.md`` beside one is what was
            found out about its orderings; its first paragraph, a quotation of one sentence, also
            stands in the table at the top of the page.

    Returns:
        The page: the folder's name with ``.md``, beside it.

    Raises:
        DataError: If the folder does not exist, or a file is not one of results.
    """
    if not folder.is_dir():
        raise DataError("there is no such folder of results", source=str(folder))
    reports: dict[str, Report] = {}
    states = {}
    for name in STUDIES:
        try:
            reports[name] = replace(read_study(name, folder), finding=_finding(folder, name))
            states[name] = _effort(folder / f"{name}.json")
        except DataError as error:
            states[name] = _absence(name, folder, error)
    for name, report in reports.items():
        report.write(folder, name)
    page = folder.with_name(f"{folder.name}.md")
    with atomic_path(page) as temporary:
        temporary.write_text("\n".join([*_lines(reports, states, folder), ""]))
    return page


def _lines(reports: dict[str, Report], states: dict[str, str], folder: Path) -> list[str]:
    lines = [
        "# Results",
        "",
        "Made by `mpd-gym reproduce --report` from the JSON files in "
        f"[{folder.name}]({folder.name}), which hold every seed and trial. Tables, orderings and "
        "figures are typed by nobody; what was found out about them is written by hand, in "
        f"`{folder.name}/NAME.cause.md`. An ordering holds if the 95 % intervals over trials are "
        "apart. They do not count how networks of other training seeds would differ; the last "
        "column says with how many seeds the ordering is seen.",
    ]
    lines += _glance(reports, folder.name)
    rows = [
        [name, *ordering.row()]
        for name, report in reports.items()
        for ordering in report.orderings
        if ordering.is_published
    ]
    if rows:
        verdicts = [row[-2].strip("*") for row in rows]
        counts = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
        text = "; ".join(f"{count} {verdict}" for verdict, count in counts.items())
        heads = ("study", *ORDERING_HEADS)
        lines += Table("Published orderings", heads, rows, f"Of {len(rows)}: {text}.").lines()
    listed = [[f"`{name}`", study.description, states[name]] for name, study in STUDIES.items()]
    lines += Table("Studies", ("study", "what it shows", "run"), listed).lines()
    for name, report in reports.items():
        moved = replace(report, finding=_RELATIVE.sub(f"]({folder.name}/", report.finding))
        lines += ["", *moved.lines(f"{folder.name}/{name}.png", level=2)]
    return lines


def _glance(reports: dict[str, Report], folder: str) -> list[str]:
    """How many published orderings hold in each study, and what was found, in one sentence."""
    rows = []
    for name, report in reports.items():
        verdicts = [one.verdict for one in report.orderings if one.is_published]
        quoted = re.match(r"(?:> .*\n?)+", report.finding)
        sentence = quoted[0].replace("> ", " ").replace("\n", "").strip() if quoted else ""
        counts = [verdicts.count(verdict) or "" for verdict in VERDICTS]
        rows.append([f"[{name}]({folder}/{name}.md)", *counts, sentence])
    heads = ("study", *VERDICTS, "what was found")
    text = "Published orderings, by how they came out here."
    return Table("At a glance", heads, rows, text).lines() if rows else []


def _finding(folder: Path, name: str) -> str:
    path = folder / f"{name}.cause.md"
    return path.read_text().strip() if path.exists() else ""


def _absence(name: str, folder: Path, error: DataError) -> str:
    """Why a study is not on the page."""
    if (folder / f"{name}.json").exists():
        return f"incomplete: {error.problem}"
    if (folder / f"{name}.md").exists():
        return f"[a report of its own]({folder.name}/{name}.md)"
    return "not run yet"


def _effort(path: Path) -> str:
    """How long a study took, and on what."""
    results = Results.read(path)
    machine = results.made_with.get("machine", "machine not noted")
    count = f"{len(results.cells)} cells"
    if "precision" in results.setting:
        count += f" in {results.setting['precision']}"
    if not results.networks:
        return f"{count}; times not noted; {machine}"
    measured = sum(cell.get("seconds", 0.0) for cell in results.cells.values()) / 3600
    trained = sum(results.networks.values()) / 3600
    return (
        f"{count}, {measured:.1f} core hours of measuring; {len(results.networks)} networks, "
        f"{trained:.1f} core hours of training; {machine}"
    )
