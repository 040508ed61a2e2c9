"""``mpd-gym``: collect data, train, evaluate, look."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mpd_gym.errors import ConfigError, MpdError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Diffusion planners for control.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()

OUTPUTS = Path("outputs")

POLICIES = """[LABEL=]SOURCE[,OPTION=VALUE,...] each. SOURCE: an agent's file, the id of a shipped
agent, "shipped" for the one that ships for ENV, or sb3:FILE for a Stable-Baselines3 zip. OPTION: a
sampling option, or deterministic."""
EnvId = Annotated[str, typer.Argument(help="Environment.")]
Policies = Annotated[list[str], typer.Argument(help=POLICIES)]
Episodes = Annotated[int, typer.Option(help="Episodes of each.", min=1)]
FirstSeed = Annotated[int, typer.Option(help="Of the first episode; the next have the next.")]
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
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


class Method(StrEnum):
    """Names of the agents, as in `mpd_gym.agents.AGENTS`."""

    mpdiffuser = "mpdiffuser"
    dmpc = "dmpc"
    planner = "planner"
    diffuser = "diffuser"
    decision_diffuser = "decision_diffuser"
    safediffuser = "safediffuser"
    behavior_cloning = "behavior_cloning"


class Preset(StrEnum):
    """Names of the presets."""

    laptop = "laptop"
    paper = "paper"


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
def info(
    source: Annotated[
        str | None, typer.Argument(help="Data set, or file of an agent; without it, what is there.")
    ] = None,
) -> None:
    """Show data sets with returns, costs, lengths and success, or what an agent's file holds."""
    if source is not None and source.endswith(".safetensors"):
        _show_agent(source)
        return
    if source is not None:
        _show_datasets([source])
        return
    import minari

    from mpd_gym.agents.files import shipped_agents

    _show_datasets(sorted(minari.list_local_datasets()))
    table = Table("shipped agent", "file")
    for name, path in shipped_agents().items():
        table.add_row(name, path.name)
    if table.row_count:
        console.print(table)


@app.command()
def train(
    dataset: Annotated[
        list[str],
        typer.Argument(
            help="Data sets or files that the planner sees, or an environment of the package, "
            "whose usual data sets must have been collected."
        ),
    ],
    method: Annotated[Method, typer.Option(help="Which agent.")] = Method.mpdiffuser,
    preset: Annotated[Preset, typer.Option(help="Size of networks and training.")] = Preset.laptop,
    env: Annotated[
        str | None, typer.Option(help="Environment whose preset is taken; the data's by default.")
    ] = None,
    dynamics: Annotated[
        list[str] | None, typer.Option(help="Other data for the dynamics model; may be repeated.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimisation steps of each model.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, batches and noise.")] = 0,
    output: Annotated[Path | None, typer.Option(help="File of the agent.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints and TensorBoard.")
    ] = None,
    device: Device = "auto",
    parallel: Annotated[bool, typer.Option(help="Train two models at a time on a CPU.")] = True,
) -> None:
    """Train an MPDiffuser, or a peer. Interrupted and called again, it goes on where it was."""
    from mpd_gym.agents import agent_class
    from mpd_gym.agents.learning import as_data
    from mpd_gym.agents.presets import DATASETS

    usual = DATASETS.get(dataset[0])
    if usual is not None:
        dataset, others = list(usual[0]), usual[1]
        dynamics = dynamics or (None if others is None else list(others))
    sources = as_data(list(dataset))
    env_id = env or sources[0].metadata.get("env_id")
    config = _config(method, preset, env_id, seed, steps)
    parts = [env_id or Path(dataset[0]).stem, preset.value, f"seed{seed}"]
    name = "-".join(parts if method is Method.mpdiffuser else [method.value, *parts])
    agent = agent_class(method.value).fit(
        sources,
        config,
        dynamics_dataset=list(dynamics) if dynamics else None,
        directory=folder or OUTPUTS / "training" / name,
        device=device,
        parallel=parallel,
    )
    path = output or OUTPUTS / "agents" / f"{name}.safetensors"
    agent.save(path)
    _show_agent(str(path))


@app.command()
def train_encoder(
    dataset: Annotated[
        str, typer.Argument(help="Data set of stacked frames.")
    ] = "mpd_gym/image-pendulum/replay-v0",
    steps: Annotated[int | None, typer.Option(help="Optimisation steps.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, held-out episodes and batches.")] = 0,
    precision: Annotated[
        str | None,
        typer.Option(help="fp32 or bf16; by default bf16 where the CPU computes in it."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File of the encoder.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints and TensorBoard.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train an encoder of images. Interrupted and called again, it goes on where it was."""
    from mpd_gym.latent.training import encoder_preset, fit_autoencoder

    config = encoder_preset(steps=steps, seed=seed, precision=precision)
    name = f"encoder-{dataset.replace('/', '-')}-seed{seed}"
    directory = folder or OUTPUTS / "training" / name
    encoder = fit_autoencoder(dataset, config, directory=directory, device=device)
    path = output or OUTPUTS / "encoders" / f"{name}.safetensors"
    encoder.save(path)
    console.print_json(data={"file": str(path), "digest": encoder.digest, **encoder.history})


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
    place = folder or OUTPUTS / "compare" / _file_name(env)
    _compare(policy, env, range(seed, seed + episodes), num_envs, option, env_option,
             deterministic, device, folder=place, film=gif)  # fmt: skip
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
    _compare(policy, env, range(seed, seed + episodes), num_envs, option, env_option,
             deterministic, device, folder=None, film=False)  # fmt: skip


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
    from mpd_gym.comparison import load_entries, parse_options
    from mpd_gym.files import write_csv
    from mpd_gym.plan_errors import error_rows, plan_errors
    from mpd_gym.reports import plan_errors_table, save_figure, state_error_figure

    env_kwargs = parse_options(env_option or [])
    options = parse_options(option or [])
    entries = load_entries(policy, env, options=options, env_kwargs=env_kwargs, device=device)
    seeds = range(seed, seed + episodes)
    agents = {entry.label: entry.policy for entry in entries}
    found = plan_errors(agents, env, seeds=seeds, env_kwargs=env_kwargs)
    place = folder or OUTPUTS / "plans" / _file_name(env)
    write_csv(place / "plan-errors.csv", error_rows(found))
    relative = {label: errors.relative for label, errors in found.items()}
    save_figure(state_error_figure(relative, "σ"), place / "plan-errors.png")
    console.print(plan_errors_table(f"{env}, seeds {seeds[0]} to {seeds[-1]}", found))
    console.print(f"Files are in {place}/")


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the GIFs go.")] = OUTPUTS / "demo",
    episodes: Annotated[int, typer.Option(help="Episodes that each policy plays.", min=1)] = 4,
) -> None:
    """Play the shipped agents against other policies: tables, CSV files and GIFs."""
    from mpd_gym.demo import run_demo
    from mpd_gym.reports import evaluation_table

    for env, results in run_demo(folder, episodes=episodes):
        console.print(evaluation_table(f"{env}, {episodes} unseen starts", results))
    console.print(f"GIFs with the plans drawn in, and all numbers, are in {folder}/")


@app.command()
def reproduce(
    name: Annotated[str | None, typer.Argument(help="Study; see --list.")] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Where results go, and agents, which studies share; outputs/studies by default. "
            "With --report, the folder of results; docs/results by default."
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

    from mpd_gym.experiments import STUDIES, run_study

    if report:
        from mpd_gym.experiments.summary import write_summary

        console.print(f"Wrote {write_summary(folder or Path('docs/results'))}")
        return
    if name is None or listed:
        table = Table("study", "what it shows", "time on 2 cores")
        for key, study in STUDIES.items():
            table.add_row(key, study.description, study.time)
        console.print(table)
        return
    from mpd_gym.experiments.frame import Scope

    place = folder or OUTPUTS / "studies"
    scope = Scope(place, _numbers(seeds), trials, preset.value, processes, precision)
    console.print(Markdown(run_study(name, scope)))


def _numbers(seeds: str) -> tuple[int, ...]:
    """Training seeds from a list such as 0,1,2."""
    try:
        return tuple(int(seed) for seed in seeds.split(","))
    except ValueError as error:
        raise ConfigError(f"seeds: expected whole numbers such as 0,1,2, got {seeds!r}") from error


def _config(
    method: Method, preset: Preset, env_id: str | None, seed: int, steps: int | None
) -> Any:
    """The preset with another seed and, if given, another length of training."""
    from dataclasses import replace

    from mpd_gym.agents.peer_presets import peer_preset

    def changed(training: Any) -> Any:
        training = replace(training, seed=seed)
        if steps is None:
            return training
        return replace(training, steps=steps, warmup_steps=min(training.warmup_steps, steps - 1))

    config: Any = peer_preset(method.value, env_id, preset.value)
    return replace(
        config,
        seed=seed,
        training=changed(config.training),
        regressor_training=changed(config.regressor_training),
    )


def _compare(
    policies: list[str],
    env: str,
    seeds: range,
    num_envs: int,
    options: list[str] | None,
    env_options: list[str] | None,
    deterministic: bool | None,
    device: str,
    *,
    folder: Path | None,
    film: bool,
) -> None:
    """Load, play and show a table."""
    from mpd_gym.comparison import compare, load_entries, parse_options
    from mpd_gym.reports import evaluation_table

    env_kwargs = parse_options(env_options or [])
    entries = load_entries(
        policies,
        env,
        options=parse_options(options or []),
        env_kwargs=env_kwargs,
        deterministic=deterministic,
        device=device,
    )
    results = compare(
        entries,
        env,
        seeds=seeds,
        num_envs=num_envs,
        env_kwargs=env_kwargs,
        folder=folder,
        film=film,
        progress=True,
    )
    console.print(evaluation_table(f"{env}, seeds {seeds[0]} to {seeds[-1]}", results))


def _file_name(env_id: str) -> str:
    return env_id.replace("/", "-").replace(":", "-")


def _show_datasets(names: list[str]) -> None:
    from mpd_gym.reports import dataset_table

    if not names:
        console.print("No data set is here yet; `mpd-gym collect` lists what can be made.")
        return
    console.print(dataset_table(names))


def _show_agent(path: str) -> None:
    from mpd_gym.agents.files import load_agent
    from mpd_gym.reports import agent_table

    console.print(agent_table(path, load_agent(path, "cpu")))


def main() -> None:
    """Run the command line; errors of this package are one line, not a traceback."""
    try:
        app()
    except MpdError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt as error:
        console.print(f"[yellow]stopped.[/yellow] {error}", highlight=False)
        sys.exit(130)
