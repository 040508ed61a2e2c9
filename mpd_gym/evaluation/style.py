"""One look for all figures: fonts, a colour for each method, legends that cover nothing.

A figure is 7 inches wide at 120 dots per inch, so that its text is readable at 700 pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BAND", "DPI", "WIDTH", "legend_below", "looks", "styled"]

WIDTH = 7.0  # inches
DPI = 120
BAND = 0.18  # opacity of intervals
COLOURS = {
    "planner alone": "#0072B2",
    "planner, levels twice": "#56B4E9",
    "MPDiffuser (level-matched, ours)": "#D55E00",
    "MPDiffuser (Algorithm 1)": "#E69F00",
    "MPDiffuser (resampled)": "#CC79A7",
    "Diffuser": "#009E73",
    "Decision Diffuser": "#7E3F8F",
    "SafeDiffuser": "#8C564B",
    "D-MPC": "#3A7D7D",
    "behaviour cloning": "#444444",
}
"""Of methods, in every figure; a name that goes on after a comma is a dashed variant of one."""
OTHERS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#7E3F8F", "#56B4E9", "#444444", "#CC79A7")
DASHES = ("-", "--", ":", "-.")
STYLE: Mapping[str, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.0,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw in this style; also a decorator of functions that draw."""
    import matplotlib

    style: Any = STYLE
    with matplotlib.rc_context(style):
        yield


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and line style of each name, as Matplotlib takes them; no two are alike.

    Args:
        names: Of methods and their variants, or any others, which share the remaining colours.
    """
    found: dict[str, dict[str, Any]] = {}
    known = {name: _method(name) for name in names}
    used = {COLOURS[method] for method in known.values() if method}
    spare = [colour for colour in OTHERS if colour not in used]
    for name, method in known.items():
        colour = COLOURS[method] if method else spare.pop(0) if spare else "#999999"
        taken = [look["linestyle"] for look in found.values() if look["color"] == colour]
        dashes = DASHES if name == method or not method else DASHES[1:] + DASHES[:1]
        style = next((one for one in dashes if one not in taken), "-")
        found[name] = {"color": colour, "linestyle": style}
    return found


def _method(name: str) -> str:
    """The method that a name begins with, the longest; empty for none."""
    fits = [one for one in COLOURS if name == one or name.startswith(f"{one}, ")]
    return max(fits, key=len, default="")


def legend_below(figure: Figure, handles: Mapping[str, Any]) -> None:
    """Name lines below all axes of a figure with a constrained layout.

    Args:
        figure: The figure.
        handles: Lines by name.
    """
    longest = max(map(len, handles))
    columns = 4 if longest < 14 else 3 if longest < 24 else 2
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(columns, len(handles)),
    )
