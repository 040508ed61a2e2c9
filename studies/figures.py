"""Figures of studies: curves over a setting, and estimates of variants beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import numpy as np

from mpd_gym.evaluation.style import BAND, WIDTH, legend_below, looks, styled
from studies.estimates import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Curve", "Panel", "curves", "dots"]


@final
@dataclass(frozen=True)
class Curve:
    """A line of a figure.

    Attributes:
        x: Places.
        y: Estimates, or plain numbers.
        published: Published values at the same places, drawn dotted; empty for none.
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
        view: Least and greatest value shown; all if None.
    """

    title: str
    lines: Mapping[str, Curve]
    x: str
    y: str
    log: bool = False
    ticks: bool = False
    view: tuple[float, float] | None = None


@styled()
def curves(panels: Sequence[Panel]) -> Figure:
    """Lines with 95 % intervals as bands, two panels to a row, the legend below."""
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    named = len(names) > 1
    figure = Figure(figsize=(WIDTH, 2.6 * rows + 0.6 * named), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    drawn: dict[str, Any] = {}
    for place, panel in zip(axes, panels, strict=False):
        for name, look in looks(names).items():
            if name in panel.lines:
                drawn[name] = _draw(place, panel.lines[name], look)
        _label(place, panel)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    if named:
        legend_below(figure, {name: drawn[name] for name in names})
    return figure


def _draw(axes: Any, curve: Curve, look: Mapping[str, str]) -> Any:
    """The line of a curve."""
    estimates = [value for value in curve.y if isinstance(value, Estimate)]
    means = [value.mean if isinstance(value, Estimate) else value for value in curve.y]
    (line,) = axes.plot(curve.x, means, marker="o" if estimates else "", **look)
    if estimates:
        low, high = zip(*((one.low, one.high) for one in estimates), strict=True)
        axes.fill_between(curve.x, low, high, alpha=BAND, color=look["color"], linewidth=0)
    if curve.published:
        axes.plot(curve.x, curve.published, ":", alpha=0.8, color=look["color"])
    return line


def _label(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    axes.set(xlabel=panel.x, ylabel=panel.y, title=panel.title)
    places = sorted({x for curve in panel.lines.values() for x in curve.x})
    if panel.log:
        wide = places[-1] > 100 * places[0]
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.minorticks_off()
    if panel.ticks:
        axes.set_xticks(places, [f"{place:g}" for place in places])
    if panel.view is not None:
        axes.set_ylim(*panel.view)


@styled()
def dots(panels: Mapping[str, Mapping[str, Estimate]], unit: str | Mapping[str, str]) -> Figure:
    """Estimates with their 95 % intervals, a row for each variant, a panel for each heading.

    Args:
        panels: Estimates by variant, by heading.
        unit: Of all panels, or of each.
    """
    from matplotlib.figure import Figure

    counts = [len(estimates) for estimates in panels.values()]
    height = sum(0.24 * count + 0.75 for count in counts)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(panels), 1, height_ratios=counts))
    for place, (title, estimates) in zip(axes, panels.items(), strict=True):
        for row, (name, look) in enumerate(looks(list(estimates)).items()):
            one = estimates[name]
            place.plot([one.low, one.high], [row, row], color=look["color"], linewidth=3, alpha=0.5)
            place.plot(one.mean, row, "o", color=look["color"], markersize=6)
        place.set_yticks(range(len(estimates)), list(estimates))
        place.set_ylim(len(estimates) - 0.5, -0.5)
        place.set_xlabel(unit if isinstance(unit, str) else unit[title])
        place.set_title(title)
    return figure
