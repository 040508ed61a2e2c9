"""``mpd-gym``: collect data, train, evaluate, look."""

from __future__ import annotations

import sys

from rich.text import Text

from mpd_gym.cli.data import collect, info
from mpd_gym.cli.learning import train, train_encoder
from mpd_gym.cli.playing import compare, demo, evaluate, plans, watch
from mpd_gym.cli.shared import app, console
from mpd_gym.cli.studies import reproduce
from mpd_gym.errors import MpdError

__all__ = [
    "app",
    "collect",
    "compare",
    "console",
    "demo",
    "evaluate",
    "info",
    "main",
    "plans",
    "reproduce",
    "train",
    "train_encoder",
    "watch",
]


def main() -> None:
    """Run the command line; errors of this package are one line, not a traceback."""
    try:
        app()
    except MpdError as error:
        console.print(Text.assemble(("error:", "red"), f" {error}"))
        sys.exit(2)
    except KeyboardInterrupt as error:
        console.print(Text.assemble(("stopped.", "yellow"), f" {error}"))
        sys.exit(130)
