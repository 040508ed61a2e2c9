"""Reports of studies, and the page of one: a screen with what was found, and details below."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from mpd_gym.atomic import atomic_path
from mpd_gym.errors import DataError
from mpd_gym.evaluation.figures import save_figure
from studies.estimates import Estimate
from studies.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from studies import Study

__all__ = [
    "LITERAL",
    "OURS",
    "UNPUBLISHED",
    "Finding",
    "Ordering",
    "Report",
    "Table",
    "first_sentence",
    "in_words",
    "markdown_table",
    "page",
    "read_page",
    "write_page",
]

OURS, LITERAL = "MPDiffuser (level-matched, ours)", "MPDiffuser (Algorithm 1)"
UNPUBLISHED = "–"
HOLDS, EQUAL, FAILS = "holds", "not apart", "does not hold"
MOST_WORDS = 120  # of what was found
SETTING = {"preset": "laptop", "trials": 250, "seeds": [0, 1, 2], "precision": "fp32"}
"""What the command does unless it is told otherwise."""
WORDS: dict[str, Callable[[Any], str]] = {
    "num_steps": lambda steps: f"{steps or 'all'} reverse steps",
    "action_chunk": lambda chunk: f"chunks of {chunk}" if chunk > 1 else "a plan for each action",
    "num_candidates": lambda count: f"{count} candidates" if count > 1 else "one candidate",
    "guidance_scale": lambda scale: f"guidance {scale:g}",
    "temperature": lambda temperature: f"temperature {temperature:g}",
    "cost_threshold": lambda threshold: f"threshold {threshold:g}",
    "sampler": str.upper,
}
"""Sampling options, as pages tell them."""


@final
@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        title: Heading above it; empty for none.
        heads: Of the columns.
        rows: Text, or anything with a text.
        text: A paragraph below it.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]
    text: str = ""

    def lines(self) -> list[str]:
        """Markdown."""
        heading = ["", f"### {self.title}"] if self.title else []
        paragraph = ["", self.text] if self.text else []
        return [*heading, "", *markdown_table(self.heads, self.rows), *paragraph]


@final
@dataclass(frozen=True)
class Ordering:
    """An ordering of two methods, published or not, and what was measured here.

    Attributes:
        statement: Such as "MPDiffuser (Algorithm 1) above planner alone".
        winner: Estimate of what is published, or expected, to be better.
        loser: Estimate of the other.
        published: Both published values, or words; a dash where nothing is published.
        higher: Whether higher is better.
        place: Where it was measured, such as a number of candidates; may be empty.
        table: ``"Table 8"`` or ``"Fig. 13"`` of the paper, if this belongs to its row on the page
            of results.
    """

    statement: str
    winner: Estimate
    loser: Estimate
    published: str = UNPUBLISHED
    higher: bool = True
    place: str = ""
    table: str = ""

    @property
    def verdict(self) -> str:
        """Whether it holds; not apart where the 95 % intervals overlap."""
        if self.winner.low <= self.loser.high and self.loser.low <= self.winner.high:
            return EQUAL
        ahead = self.winner.mean > self.loser.mean
        return HOLDS if ahead == self.higher else FAILS

    @property
    def difference(self) -> str:
        """Of winner and loser, trial by trial, with its 95 % interval."""
        found = self.winner.less(self.loser)
        if found is None:
            return UNPUBLISHED
        digits = self.winner.digits
        return f"{found.mean:+.{digits}f} ± {found.high - found.mean:.{digits}f}"

    @property
    def seeds(self) -> str:
        """With how many training seeds it holds."""
        pairs = list(zip(self.winner.seeds, self.loser.seeds, strict=False))
        ahead = sum((a > b) if self.higher else (a < b) for a, b in pairs)
        return f"{ahead} of {len(pairs)}"


@final
@dataclass(frozen=True)
class Report:
    """What a study measured.

    Attributes:
        title: Heading.
        question: What it asks.
        table: The answer, beside published values.
        figure: The same, or what explains it.
        caption: What to see in the figure.
        text: What was measured and how.
        details: More tables.
        orderings: Published ones, and others worth knowing.
    """

    title: str
    question: str
    table: Table
    figure: Figure
    caption: str
    text: str
    details: Sequence[Table] = ()
    orderings: Sequence[Ordering] = ()


@final
@dataclass(frozen=True)
class Finding:
    """What a person wrote about a report, in ``NAME.finding.md``.

    Attributes:
        found: What was found.
        limits: What it does not show.
        details: What else was learned; may be empty.
    """

    found: str
    limits: str
    details: str = ""

    @classmethod
    def read(cls, path: Path) -> Finding | None:
        """Read the file; None where there is none.

        Raises:
            DataError: If it is not UTF-8, a section is missing or unknown, or it is too long.
        """
        if not path.exists():
            return None
        text = read_page(path)
        found, *sections = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
        rest = {
            title: text.strip() for title, text in zip(sections[::2], sections[1::2], strict=True)
        }
        if not found.strip() or rest.keys() not in ({"Not shown"}, {"Not shown", "Details"}):
            raise DataError(
                "expected the finding, then '## Not shown' and perhaps '## Details'; got the "
                f"sections {list(rest)}",
                source=str(path),
            )
        words = len(found.split())
        if words > MOST_WORDS:
            raise DataError(f"the finding has {words} words, at most {MOST_WORDS} are wanted",
                            source=str(path))  # fmt: skip
        return cls(found.strip(), rest["Not shown"], rest.get("Details", ""))

    @property
    def sentence(self) -> str:
        """The first sentence of what was found, on one line."""
        return first_sentence(self.found)


def write_page(folder: Path, name: str, study: Study, report: Report, results: Results) -> str:
    """Write ``name.md`` and ``name.png``, and return the text; arguments as `page`."""
    text = page(folder, name, study, report, results)
    save_figure(report.figure, folder / f"{name}.png")
    with atomic_path(folder / f"{name}.md") as temporary:
        temporary.write_text(text)
    return text


def page(folder: Path, name: str, study: Study, report: Report, results: Results) -> str:
    """The page of a study, in Markdown.

    Args:
        folder: Where ``name.finding.md`` is.
        name: Of the study.
        study: The study, for its time.
        report: What was measured.
        results: The stored values.
    """
    finding = Finding.read(folder / f"{name}.finding.md")
    lines = [f"# {report.title}", "", report.question, *report.table.lines()]
    lines += ["", f"![{report.title}]({name}.png)", "", f"*{report.caption}*"]
    if finding is not None:
        lines += ["", f"**Found.** {finding.found}"]
        lines += ["", f"**Not shown.** {finding.limits}"]
    time = study.takes(len(results.setting["seeds"]))
    lines += ["", f"**Command.** `{_command(name, results)}`, {time} on two cores."]
    lines += ["", "---", "", "## Details", "", report.text, "", f"{_effort(results)}."]
    if finding is not None and finding.details:
        lines += ["", finding.details]
    lines += _ordering_lines(report.orderings)
    for table in report.details:
        lines += table.lines()
    return "\n".join([*lines, ""])


def read_page(path: Path) -> str:
    """Read what a person wrote.

    Raises:
        DataError: If it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"expected text in UTF-8 ({error}); save it as UTF-8", source=str(path)
        ) from error


def first_sentence(text: str) -> str:
    """On one line."""
    return re.split(r"(?<=\.)\s", text.replace("\n", " "), maxsplit=1)[0]


def in_words(options: Mapping[str, Any]) -> str:
    """Sampling options as a page tells them, such as "5 reverse steps, chunks of 8".

    Args:
        options: Of `SamplingConfig`; the composition is left out, as methods are named after it.
    """
    return ", ".join(WORDS[name](one) for name, one in options.items() if name != "composition")


def _ordering_lines(orderings: Sequence[Ordering]) -> list[str]:
    measured = {(one.statement, one.place) for one in orderings}

    def published(one: Ordering) -> str:
        """Published values are of Algorithm 1, and stand in its row where there is one."""
        published = one.statement.replace(OURS, LITERAL)
        beside = published != one.statement and (published, one.place) in measured
        return UNPUBLISHED if beside else one.published

    rows = [
        [
            f"{one.statement}, {one.place}" if one.place else one.statement,
            published(one),
            " : ".join(f"{side.mean:.{side.digits}f}" for side in (one.winner, one.loser)),
            one.difference,
            one.verdict,
            one.seeds,
        ]
        for one in orderings
    ]
    heads = ("comparison", "published", "here", "difference", "verdict", "seeds")
    text = (
        "Difference: trial by trial, with its 95 % interval. Holds: the intervals of both are "
        "apart; not apart: they overlap. Seeds: with how many trainings the ordering is seen."
    )
    if any(OURS in one.statement and one.published != UNPUBLISHED for one in orderings):
        text += f" Published values of MPDiffuser are those of {LITERAL}."
    return Table("Comparisons", heads, rows, text).lines() if rows else []


def _command(name: str, results: Results) -> str:
    """The command line of the stored results."""
    parts = [f"python -m studies {name}"]
    for key, usual in SETTING.items():
        value = results.setting.get(key, usual)
        if value != usual:
            parts.append(f"--{key} {','.join(map(str, value)) if key == 'seeds' else value}")
    return " ".join(parts)


def _effort(results: Results) -> str:
    """How long a study took, and on what."""
    machine = results.made_with.get("machine", "machine not noted")
    count = f"{len(results.cells)} measurements"
    if not results.networks:
        return f"{count}, times not noted; {machine}"
    measured = sum(cell.get("seconds", 0.0) for cell in results.cells.values()) / 3600
    trained = sum(results.networks.values()) / 3600
    return (
        f"{count} in {measured:.1f} core hours; {len(results.networks)} networks trained in "
        f"{trained:.1f} core hours; {machine}"
    )


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]
