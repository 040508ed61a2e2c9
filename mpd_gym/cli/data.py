"""``mpd-gym collect``, ``check`` and ``info``: data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from mpd_gym.cli.shared import OUTPUTS, app, console, show_agent

__all__ = ["check", "collect", "info"]


@app.command()
def collect(
    name: Annotated[
        str | None, typer.Argument(help="Data set; without it, all that can be made are listed.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    fraction: Annotated[float, typer.Option(help="Share of the full size, for a try.")] = 1.0,
    processes: Annotated[int, typer.Option(help="Processes that record.")] = 2,
    dataset_id: Annotated[
        str | None, typer.Option("--id", help="Other id for the result, such as me/try-v0.")
    ] = None,
    policies: Annotated[
        Path, typer.Option(help="Folder for policies that are trained on the way.")
    ] = OUTPUTS / "policies",
    overwrite: Annotated[bool, typer.Option(help="Replace a data set of that id.")] = False,
) -> None:
    """Make a data set. Interrupted and called again, it goes on where it was."""
    from mpd_gym.collect.recipes import RECIPES, collect

    if name is None:
        table = Table("data set", "content")
        for recipe in RECIPES.values():
            table.add_row(recipe.dataset_id, recipe.description)
        console.print(table)
        return
    options: dict[str, Any] = {} if dataset_id is None else {"dataset_id": dataset_id}
    made = collect(
        name,
        seed=seed,
        fraction=fraction,
        processes=processes,
        policies=policies,
        overwrite=overwrite,
        **options,
    )
    _show_datasets([made.spec.dataset_id])


@app.command()
def check(
    dataset: Annotated[str, typer.Argument(help="Data set or file.")],
    horizon: Annotated[
        int | None, typer.Option(help="Steps of the plans that are to be learned.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Plot of all dimensions (PNG).")] = None,
) -> None:
    """Show what is suspicious in a data set, with statistics; exit with 1 if it cannot be right."""
    from mpd_gym.datasets import WindowConfig, check_data, load_episodes
    from mpd_gym.evaluation.figures import dimension_table, dimensions_figure, save_figure

    source = load_episodes(dataset)
    windows = None if horizon is None else WindowConfig(horizon)
    report = check_data(source, windows, rows=100_000)
    steps = int(source.lengths.sum())
    console.print(dimension_table(f"{dataset}: {len(source)} episodes, {steps} steps", report))
    for kind, style, found in (
        ("error", "red", report.errors),
        ("warning", "yellow", report.warnings),
    ):
        for finding in found:
            console.print(Text.assemble((f"{kind}:", style), f" {finding}"))
    if not (report.errors or report.warnings):
        console.print("Nothing suspicious was found.")
    if output is not None:
        console.print(f"Wrote {save_figure(dimensions_figure(report), output)}")
    raise typer.Exit(bool(report.errors))


@app.command()
def info(
    source: Annotated[
        str | None,
        typer.Argument(
            help="Data set, file of an agent, or name of a shipped one; without it, what is there."
        ),
    ] = None,
) -> None:
    """Show data sets with returns, costs, lengths and success, or what an agent's file holds."""
    import minari

    from mpd_gym.agents.serialization import shipped_agents
    from mpd_gym.atomic import writing
    from mpd_gym.collect.storage import DATASETS
    from mpd_gym.models.backends.library import describe

    if source is not None:
        if source.endswith(".safetensors") or source in shipped_agents():
            show_agent(source)
        else:
            _show_datasets([source])
        return
    with writing(DATASETS):
        names = sorted(minari.list_local_datasets())
    _show_datasets(names)
    table = Table("shipped agent", "file")
    for name, path in shipped_agents().items():
        table.add_row(name, path.name)
    if table.row_count:
        console.print(table)
    console.print(describe())


def _show_datasets(names: list[str]) -> None:
    from mpd_gym.evaluation.figures import dataset_table

    if not names:
        console.print("No data set is here yet; `mpd-gym collect` lists what can be made.")
        return
    console.print(dataset_table(names))
