"""Reports of studies: tables beside published values, orderings, and figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from mpd_gym.atomic import atomic_path
from mpd_gym.evaluation.figures import save_figure
from studies.estimates import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "ORDERING_HEADS",
    "UNPUBLISHED",
    "VERDICTS",
    "Curve",
    "Ordering",
    "Panel",
    "Report",
    "Table",
    "curves",
    "markdown_table",
]

ORDERING_HEADS = ("published ordering", "published", "here", "verdict", "seeds")
UNPUBLISHED = "–"
VERDICTS = ("holds", "holds, intervals overlap", "not seen, intervals overlap", "**does not hold**")


@final
@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        title: Heading above it; empty for none.
        heads: Of the columns.
        rows: Text, or anything with a text.
        text: A paragraph below the heading.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Any]]
    text: str = ""

    def lines(self, level: int = 2) -> list[str]:
        """Markdown, with a heading of a level."""
        heading = ["", f"{'#' * level} {self.title}"] if self.title else []
        paragraph = ["", self.text] if self.text else []
        return [*heading, *paragraph, "", *markdown_table(self.heads, self.rows)]


@final
@dataclass(frozen=True)
class Ordering:
    """An ordering of two methods, published or not, and what was measured here.

    Attributes:
        statement: Such as "MPDiffuser above its planner".
        winner: Estimate of what is published, or expected, to be better.
        loser: Estimate of the other.
        published: Both published values, or words; a dash where nothing is published.
        higher: Whether higher is better.
    """

    statement: str
    winner: Estimate
    loser: Estimate
    published: str
    higher: bool = True

    @property
    def is_published(self) -> bool:
        """Whether the paper has it."""
        return self.published != UNPUBLISHED

    @property
    def verdict(self) -> str:
        """Whether it holds, and whether the 95 % intervals are apart."""
        sign = 1 if self.higher else -1
        ahead = sign * (self.winner.mean - self.loser.mean)
        apart = self.winner.low > self.loser.high or self.winner.high < self.loser.low
        holds, ahead_within, behind_within, fails = VERDICTS
        if ahead > 0:
            return holds if apart else ahead_within
        return fails if apart else behind_within

    @property
    def seeds(self) -> str:
        """With how many training seeds it holds."""
        pairs = list(zip(self.winner.seeds, self.loser.seeds, strict=False))
        ahead = sum((a > b) if self.higher else (a < b) for a, b in pairs)
        return f"{ahead} of {len(pairs)}"

    def row(self) -> list[str]:
        """Row of a table of orderings."""
        here = " : ".join(f"{one.mean:.{one.digits}f}" for one in (self.winner, self.loser))
        return [self.statement, self.published, here, self.verdict, self.seeds]


@final
@dataclass(frozen=True)
class Report:
    """What a study found.

    Attributes:
        title: Heading.
        text: What was measured and how.
        tables: In order.
        orderings: Published ones, and others worth knowing.
        figure: Or None.
        finding: What was found out about the orderings, in Markdown.
    """

    title: str
    text: str
    tables: Sequence[Table]
    orderings: Sequence[Ordering] = ()
    figure: Figure | None = None
    finding: str = ""

    def lines(self, figure: str, level: int = 1) -> list[str]:
        """The whole report, as lines of Markdown.

        Args:
            figure: Where the figure is, as a link.
            level: Of its heading.
        """
        lines = [f"{'#' * level} {self.title}", "", self.text]
        if self.figure is not None:
            lines += ["", f"![{self.title}]({figure})"]
        if self.finding:
            lines += ["", self.finding]
        lines += self._ordering_lines(level + 1)
        for table in self.tables:
            lines += table.lines(level + 1)
        return lines

    def _ordering_lines(self, level: int) -> list[str]:
        published = [one.row() for one in self.orderings if one.is_published]
        others = [one.row() for one in self.orderings if not one.is_published]
        lines: list[str] = []
        if published:
            lines += Table("Published orderings", ORDERING_HEADS, published).lines(level)
        if others:
            heads = ("comparison", *ORDERING_HEADS[2:])
            rows = [[statement, *rest] for statement, _, *rest in others]
            lines += Table("Other comparisons", heads, rows).lines(level)
        return lines

    def write(self, folder: Path, name: str) -> str:
        """Write ``name.md`` and ``name.png``, and return the text."""
        text = "\n".join([*self.lines(f"{name}.png"), ""])
        if self.figure is not None:
            save_figure(self.figure, folder / f"{name}.png")
        with atomic_path(folder / f"{name}.md") as temporary:
            temporary.write_text(text)
        return text


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


@final
@dataclass(frozen=True)
class Curve:
    """A line of a figure.

    Attributes:
        x: Places.
        y: Estimates, or plain numbers.
        published: Published values at the same places, drawn dashed; empty for none.
    """

    x: Sequence[float]
    y: Sequence[Estimate | float]
    published: Sequence[float] = field(default_factory=tuple)


@final
@dataclass(frozen=True)
class Panel:
    """A part of a figure.

    Attributes:
        title: Above it.
        lines: Curves by name.
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
        log: Whether the horizontal axis is logarithmic.
        ticks: Whether it is marked at the curves' places only.
    """

    title: str
    lines: Mapping[str, Curve]
    x: str
    y: str
    log: bool = False
    ticks: bool = False


def curves(panels: Sequence[Panel]) -> Figure:
    """Lines with 95 % intervals, of one colour for one name.

    The legend has a free place of the grid, or the first panel.
    """
    from matplotlib.figure import Figure

    columns = min(2 if len(panels) == 4 else 3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1 + 4 * columns, 0.4 + 3.2 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    drawn: dict[str, Any] = {}
    for place, panel in zip(axes, panels, strict=False):
        for name, curve in panel.lines.items():
            drawn[name] = _draw(place, curve, f"C{names.index(name)}")
        place.set(xlabel=panel.x, ylabel=panel.y, title=panel.title)
        place.set_xscale("log" if panel.log else "linear")
        if panel.ticks:
            marks = sorted({x for curve in panel.lines.values() for x in curve.x})
            place.set_xticks(marks, [f"{mark:g}" for mark in marks])
            place.minorticks_off()
        place.grid(alpha=0.3)
    spare = axes[len(panels) :]
    for place in spare:
        place.set_axis_off()
    (spare[0] if len(spare) else axes[0]).legend(
        [drawn[name] for name in names], names, frameon=False, fontsize=8
    )
    return figure


def _draw(axes: Any, curve: Curve, colour: str) -> Any:
    """The line of a curve."""
    estimates = [value for value in curve.y if isinstance(value, Estimate)]
    means = [value.mean if isinstance(value, Estimate) else value for value in curve.y]
    style = {"color": colour, "markersize": 4}
    (line,) = axes.plot(curve.x, means, "o-" if estimates else "-", **style)
    if estimates:
        low, high = zip(*((one.low, one.high) for one in estimates), strict=True)
        axes.fill_between(curve.x, low, high, alpha=0.15, color=colour)
    if curve.published:
        axes.plot(curve.x, curve.published, "--", alpha=0.6, color=colour)
    return line
