"""What all commands share: the application, where it prints, and options of several of them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["OUTPUTS", "Device", "Preset", "app", "console", "file_name", "show_agent"]

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


def file_name(env_id: str) -> str:
    """An environment's id as part of a path."""
    return env_id.replace("/", "-").replace(":", "-")


def show_agent(path: str) -> None:
    """Print what an agent's file holds."""
    from mpd_gym.agents.files import load_agent
    from mpd_gym.reports import agent_table

    console.print(agent_table(path, load_agent(path, "cpu")))
