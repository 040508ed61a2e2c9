"""``python -m studies``: run a study or a probe, list them, or write the studies' pages."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from mpd_gym.cli.shared import OUTPUTS, Preset, console, reported
from mpd_gym.errors import ConfigError
from studies.probes import PROBES

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    name: Annotated[str | None, typer.Argument(help="Study; see --list.")] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Where results go, and agents, which studies share; outputs/studies by default. "
            "With --report, the folder of results; docs/results by default.",
        ),
    ] = None,
    preset: Annotated[Preset, typer.Option(help="Size of networks and training.")] = Preset.laptop,
    seeds: Annotated[str, typer.Option(help="Training seeds, such as 0,1,2.")] = "0,1,2",
    trials: Annotated[int, typer.Option(help="Trials of each cell.", min=1)] = 250,
    processes: Annotated[int, typer.Option(help="Processes that measure.", min=0)] = 2,
    precision: Annotated[
        str, typer.Option(help="Arithmetic of what is measured: fp32, bf16 or plain.")
    ] = "fp32",
    listed: Annotated[
        bool, typer.Option("--list", help="List all studies with their expected time.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write the page of all stored results.")
    ] = False,
) -> None:
    """Run a study: train what is missing, measure, and write every seed and trial.

    Interrupted and called again, it goes on where it was.
    """
    from rich.markdown import Markdown

    from studies import STUDIES, run_study

    if report:
        from studies.summary import write_summary

        console.print(f"Wrote {write_summary(folder or Path('docs/results'))}")
        return
    if name is None or listed:
        table = Table("study", "what it shows", "time on 2 cores")
        for key, study in STUDIES.items():
            table.add_row(key, study.description, study.times)
        console.print(table)
        probes = Table("probe", "what it looks into (its options: NAME --help)")
        for key, description in PROBES.items():
            probes.add_row(key, description)
        console.print(probes)
        return
    from studies.runner import Scope

    place = folder or OUTPUTS / "studies"
    scope = Scope(place, _numbers(seeds), trials, preset.value, processes, precision)
    console.print(Markdown(run_study(name, scope)))


def _numbers(seeds: str) -> tuple[int, ...]:
    """Training seeds from a list such as 0,1,2."""
    try:
        numbers = tuple(int(seed) for seed in seeds.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise ConfigError(f"seeds: expected different whole numbers such as 0,1,2; got {seeds!r}")
    return numbers


def main() -> None:
    """Run the command line; errors of the package are one line, not a traceback."""
    name, *rest = sys.argv[1:] or [""]
    with reported():
        if name in PROBES:
            sys.argv = [f"python -m studies {name}", *rest]
            import_module(f"studies.probes.{name.replace('-', '_')}").main()
        else:
            app()


if __name__ == "__main__":
    main()
