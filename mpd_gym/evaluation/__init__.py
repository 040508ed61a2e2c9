"""Judging agents and policies: returns, open-loop errors, comparisons, figures, and watching.

Names are loaded when they are first used, so that importing the room stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpd_gym.evaluation.comparison import Entry, compare, load_entries
    from mpd_gym.evaluation.figures import rollout_frames, save_gif
    from mpd_gym.evaluation.open_loop import OpenLoopErrors, open_loop_error
    from mpd_gym.evaluation.returns import (
        Evaluation,
        Interval,
        evaluate,
        mean_interval,
        proportion_interval,
    )
__all__ = [
    "Entry",
    "Evaluation",
    "Interval",
    "OpenLoopErrors",
    "compare",
    "evaluate",
    "load_entries",
    "mean_interval",
    "open_loop_error",
    "proportion_interval",
    "rollout_frames",
    "save_gif",
]

_MODULES = {
    "comparison": ("Entry", "compare", "load_entries"),
    "figures": ("rollout_frames", "save_gif"),
    "open_loop": ("OpenLoopErrors", "open_loop_error"),
    "returns": ("Evaluation", "Interval", "evaluate", "mean_interval", "proportion_interval"),
}


def __getattr__(name: str) -> Any:
    """Load a name when it is first used."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
