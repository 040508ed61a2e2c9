"""``mpd-gym``: collect data, train, evaluate, look."""

from __future__ import annotations

import warnings

from mpd_gym.cli.data import check, collect, info
from mpd_gym.cli.learning import train, train_encoder
from mpd_gym.cli.playing import compare, demo, evaluate, plans, watch
from mpd_gym.cli.shared import app, console, reported

__all__ = [
    "app",
    "check",
    "collect",
    "compare",
    "console",
    "demo",
    "evaluate",
    "info",
    "main",
    "plans",
    "train",
    "train_encoder",
    "watch",
]


def main() -> None:
    """Run the command line; errors and warnings are one line, without tracebacks or code."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    with reported():
        app()
