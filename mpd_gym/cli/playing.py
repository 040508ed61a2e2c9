"""``mpd-gym compare``, ``evaluate``, ``watch``, ``plans`` and ``demo``: policies at work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpd_gym.atomic import file_name
from mpd_gym.cli.shared import OUTPUTS, Device, app, console

if TYPE_CHECKING:
    from mpd_gym.evaluation.comparison import Entry

__all__ = ["compare", "demo", "evaluate", "plans", "watch"]

POLICIES = """[LABEL=]SOURCE[,OPTION=VALUE,...] each. SOURCE: an agent's file, the id of a shipped
agent, "shipped" for the one that ships for ENV, or sb3:FILE for a Stable-Baselines3 zip. OPTION: a
sampling option, or deterministic, or vecnormalize=FILE for a zip trained under VecNormalize."""
EnvId = Annotated[str, typer.Argument(help="Environment.")]
Policies = Annotated[list[str], typer.Argument(help=POLICIES)]
Episodes = Annotated[int, typer.Option(help="Episodes of each.", min=1)]
FirstSeed = Annotated[
    int, typer.Option(help="Of the first episode; the next have the next.", min=0)
]
NumEnvs = Annotated[int, typer.Option(help="Copies that one call of predict serves.", min=1)]
SamplingOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-o", help="Sampling option name=value of every agent; may be repeated."
    ),
]
EnvOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--env-option", "-e", help="Argument name=value of the environment; may be repeated."
    ),
]
Deterministic = Annotated[
    bool | None,
    typer.Option(
        "--deterministic/--stochastic",
        help="Of all policies; by default those of Stable-Baselines3 are deterministic, and agents "
        "draw from their own seed.",
        show_default=False,
    ),
]


@app.command()
def compare(
    env: EnvId,
    policy: Policies,
    episodes: Episodes = 20,
    seed: FirstSeed = 0,
    num_envs: NumEnvs = 10,
    option: SamplingOptions = None,
    env_option: EnvOptions = None,
    deterministic: Deterministic = None,
    device: Device = "auto",
    folder: Annotated[
        Path | None, typer.Option(help="Where the files go; outputs/compare/ENV by default.")
    ] = None,
    gif: Annotated[bool, typer.Option(help="Film the first seed, all side by side.")] = True,
) -> None:
    """Play the same seeds with every policy: a table, summary.csv, episodes.csv and a GIF.

    One file with other options is another policy; quote values that hold brackets:

        mpd-gym compare CarUMaze-v0 shipped alone=shipped,composition=planner_only

        mpd-gym compare Pendulum-v1 mine=agent.safetensors,num_candidates=8 sac=sb3:sac.zip
    """
    place = folder or OUTPUTS / "compare" / file_name(env)
    entries, env_kwargs = _loaded(policy, env, option, env_option, device, deterministic)
    _compare(entries, env, range(seed, seed + episodes), num_envs, env_kwargs, place, film=gif)
    console.print(f"Files are in {place}/")


@app.command()
def evaluate(
    env: EnvId,
    policy: Policies,
    episodes: Episodes = 20,
    seed: FirstSeed = 0,
    num_envs: NumEnvs = 10,
    option: SamplingOptions = None,
    env_option: EnvOptions = None,
    deterministic: Deterministic = None,
    device: Device = "auto",
) -> None:
    """Compare without writing files."""
    entries, env_kwargs = _loaded(policy, env, option, env_option, device, deterministic)
    _compare(entries, env, range(seed, seed + episodes), num_envs, env_kwargs)


@app.command()
def watch(
    env: EnvId,
    policy: Policies,
    seed: FirstSeed = 0,
    episodes: Annotated[
        int | None, typer.Option(help="Starts; without it, until the window is closed.", min=1)
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(help="Pictures per second; the environment's own by default.", min=1),
    ] = None,
    option: SamplingOptions = None,
    env_option: EnvOptions = None,
    deterministic: Deterministic = None,
    device: Device = "auto",
) -> None:
    """Watch policies in a window, side by side, each with its plan drawn in.

    Space pauses, the right arrow goes one step, N goes to the next start, R begins again, + and -
    change the speed, Q ends.

        mpd-gym watch CarUMaze-v0 shipped
    """
    from mpd_gym.evaluation.watch import watch as watch_window

    entries, env_kwargs = _loaded(policy, env, option, env_option, device, deterministic)
    watch_window(entries, env, seed=seed, episodes=episodes, env_kwargs=env_kwargs, fps=fps)


@app.command()
def plans(
    env: EnvId,
    policy: Policies,
    episodes: Annotated[int, typer.Option(help="Plans of each.", min=1)] = 50,
    seed: FirstSeed = 0,
    option: SamplingOptions = None,
    env_option: EnvOptions = None,
    device: Device = "auto",
    folder: Annotated[
        Path | None, typer.Option(help="Where the files go; outputs/plans/ENV by default.")
    ] = None,
) -> None:
    """Measure how far what happens is from what agents plan: a table, plan-errors.csv and .png.

    Each plan is executed to its end without looking; `action_chunk` should not be longer than plans
    hold.
    """
    from mpd_gym.atomic import check_writable, write_csv
    from mpd_gym.evaluation.figures import open_loop_table, save_figure, state_error_figure
    from mpd_gym.evaluation.open_loop import error_rows, open_loop_error

    entries, env_kwargs = _loaded(policy, env, option, env_option, device)
    place = folder or OUTPUTS / "plans" / file_name(env)
    check_writable(place)
    seeds = range(seed, seed + episodes)
    agents = {entry.label: entry.policy for entry in entries}
    found = open_loop_error(agents, env, seeds=seeds, env_kwargs=env_kwargs)
    console.print(open_loop_table(f"{env}, seeds {seeds[0]} to {seeds[-1]}", found))
    write_csv(place / "plan-errors.csv", error_rows(found))
    relative = {label: errors.relative for label, errors in found.items()}
    save_figure(state_error_figure(relative, "σ"), place / "plan-errors.png")
    console.print(f"Files are in {place}/")


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the GIFs go.")] = OUTPUTS / "demo",
    episodes: Annotated[int, typer.Option(help="Episodes that each policy plays.", min=1)] = 4,
) -> None:
    """Play the shipped agents against other policies: tables, CSV files and GIFs."""
    from mpd_gym.evaluation.demo import run_demo
    from mpd_gym.evaluation.figures import evaluation_table

    for env, results in run_demo(folder, episodes=episodes):
        console.print(evaluation_table(f"{env}, {episodes} unseen starts", results))
    console.print(f"GIFs with the plans drawn in, and all numbers, are in {folder}/")


def _loaded(
    policies: list[str],
    env: str,
    options: list[str] | None,
    env_options: list[str] | None,
    device: str,
    deterministic: bool | None = None,
) -> tuple[list[Entry], dict[str, Any]]:
    """The policies, and the environment's arguments."""
    from mpd_gym.evaluation.comparison import load_entries, parse_options

    kwargs = parse_options(env_options or [])
    common = {"options": parse_options(options or []), "env_kwargs": kwargs}
    return load_entries(policies, env, deterministic=deterministic, device=device, **common), kwargs


def _compare(
    entries: list[Entry],
    env: str,
    seeds: range,
    num_envs: int,
    env_kwargs: dict[str, Any],
    folder: Path | None = None,
    *,
    film: bool = False,
) -> None:
    """Play, show a table, then write the files: what cannot be written does not cost the table."""
    from mpd_gym.evaluation.comparison import compare
    from mpd_gym.evaluation.figures import evaluation_table

    title = f"{env}, seeds {seeds[0]} to {seeds[-1]}"
    compare(
        entries,
        env,
        seeds=seeds,
        num_envs=num_envs,
        env_kwargs=env_kwargs,
        folder=folder,
        film=film,
        progress=True,
        on_played=lambda results: console.print(evaluation_table(title, results)),
    )
