"""``mpd-gym train`` and ``train-encoder``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mpd_gym.agents import AGENTS
from mpd_gym.atomic import file_name
from mpd_gym.cli.shared import OUTPUTS, Device, Preset, app, console, show_agent

__all__ = ["train", "train_encoder"]


@app.command()
def train(
    dataset: Annotated[
        list[str],
        typer.Argument(
            help="Data sets or files that the planner sees, or an environment of the package, "
            "whose usual data sets must have been collected."
        ),
    ],
    method: Annotated[str, typer.Option(help=f"Which agent: {', '.join(AGENTS)}.")] = "mpdiffuser",
    preset: Annotated[Preset, typer.Option(help="Size of networks and training.")] = Preset.laptop,
    env: Annotated[
        str | None, typer.Option(help="Environment whose preset is taken; the data's by default.")
    ] = None,
    dynamics: Annotated[
        list[str] | None, typer.Option(help="Other data for the dynamics model; may be repeated.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimisation steps of each model.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, batches and noise.", min=0)] = 0,
    precision: Annotated[
        str, typer.Option(help="fp32, or bf16: faster where the CPU or GPU multiplies it.")
    ] = "fp32",
    output: Annotated[Path | None, typer.Option(help="File of the agent.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints and TensorBoard.")
    ] = None,
    device: Device = "auto",
    parallel: Annotated[bool, typer.Option(help="Train two models at a time on a CPU.")] = True,
) -> None:
    """Train an MPDiffuser, or a peer. Interrupted and called again, it goes on where it was."""
    from mpd_gym.agents import agent_class
    from mpd_gym.agents.fitting import as_data
    from mpd_gym.agents.presets import DATASETS

    kind = agent_class(method)
    usual = DATASETS.get(dataset[0])
    if usual is not None:
        dataset, others = list(usual[0]), usual[1]
        dynamics = dynamics or (None if others is None else list(others))
    sources = as_data(list(dataset))
    env_id = env or sources[0].metadata.get("env_id")
    config = _config(method, preset.value, env_id, seed, steps, precision)
    parts = [file_name(env_id or Path(dataset[0]).stem), preset.value, f"seed{seed}"]
    name = "-".join(parts if method == "mpdiffuser" else [method, *parts])
    agent = kind.fit(
        sources,
        config,
        dynamics_dataset=list(dynamics) if dynamics else None,
        directory=folder or OUTPUTS / "training" / name,
        device=device,
        parallel=parallel,
    )
    path = output or OUTPUTS / "agents" / f"{name}.safetensors"
    agent.save(path)
    show_agent(str(path))


@app.command()
def train_encoder(
    dataset: Annotated[
        str, typer.Argument(help="Data set of stacked frames.")
    ] = "mpd_gym/image-pendulum/replay-v0",
    steps: Annotated[int | None, typer.Option(help="Optimisation steps.")] = None,
    seed: Annotated[
        int, typer.Option(help="Of weights, held-out episodes and batches.", min=0)
    ] = 0,
    precision: Annotated[
        str | None,
        typer.Option(help="fp32 or bf16; by default bf16 where the CPU computes in it."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File of the encoder.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints and TensorBoard.")
    ] = None,
    device: Device = "cpu",
) -> None:
    """Train an encoder of images. Interrupted and called again, it goes on where it was."""
    from mpd_gym.latent.training import encoder_preset, fit_autoencoder

    config = encoder_preset(steps=steps, seed=seed, precision=precision)
    name = f"encoder-{file_name(dataset)}-seed{seed}"
    directory = folder or OUTPUTS / "training" / name
    encoder = fit_autoencoder(dataset, config, directory=directory, device=device)
    path = output or OUTPUTS / "encoders" / f"{name}.safetensors"
    encoder.save(path)
    console.print_json(data={"file": str(path), "digest": encoder.digest, **encoder.history})


def _config(
    method: str, size: str, env_id: str | None, seed: int, steps: int | None, precision: str
) -> Any:
    """The preset with another seed and precision and, if given, another length of training."""
    from mpd_gym.agents.presets import preset

    def changed(training: Any) -> Any:
        training = replace(training, seed=seed)
        return training if steps is None else training.with_steps(steps)

    config: Any = preset(size, env_id, method)
    return replace(
        config,
        seed=seed,
        training=replace(changed(config.training), precision=precision),
        regressor_training=changed(config.regressor_training),
    )
