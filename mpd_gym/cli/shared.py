"""What all commands share: the application, where it prints, and options of several of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from mpd_gym.errors import MpdError

__all__ = ["OUTPUTS", "Device", "Preset", "app", "console", "reported", "show_agent"]

app = typer.Typer(
    help="Diffusion planners for control.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console(markup=False)  # or what stands in brackets, such as pip's extras, is not shown

OUTPUTS = Path("outputs")

Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


class Preset(StrEnum):
    """Names of the presets."""

    laptop = "laptop"
    paper = "paper"


def show_agent(path: str) -> None:
    """Print what an agent's file holds."""
    from mpd_gym.agents import load_agent
    from mpd_gym.evaluation.figures import agent_table

    console.print(agent_table(path, load_agent(path, "cpu")))


@contextmanager
def reported() -> Iterator[None]:
    """Show errors of this package in one line, not as a traceback, and exit."""
    try:
        yield
    except MpdError as error:
        notes = [note for note in getattr(error, "__notes__", []) if "\n" not in note]
        console.print(Text.assemble(("error:", "red"), f" {'; '.join([str(error), *notes])}"))
        sys.exit(2)
    except KeyboardInterrupt as error:
        console.print(Text.assemble(("stopped.", "yellow"), f" {error}"))
        sys.exit(130)
