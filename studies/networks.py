"""Agents of studies, keyed by what defines them, so that studies share what they train.

A `Network` says method, data, configuration and seed; its file stands in one folder of agents under
a name made of those. An agent of the plain preset has a plain name, such as
``car-seed1.safetensors``, and may come from elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, final

import numpy as np

from mpd_gym.agents import agent_class, load_agent
from mpd_gym.agents.config import AgentConfig
from mpd_gym.agents.diffusion_agent import DiffusionAgent
from mpd_gym.agents.mpdiffuser import MPDiffuserAgent, MPDiffuserConfig
from mpd_gym.agents.presets import DATASETS, preset
from mpd_gym.agents.trained import TrainedAgent
from mpd_gym.collect.recipes import collect
from mpd_gym.datasets import EpisodeSource, cost_at_most, load_episodes
from mpd_gym.datasets.source import MemorySource
from mpd_gym.errors import ConfigError, DataError
from mpd_gym.latent import ImageEncoder, encode_episodes

__all__ = ["Data", "Network", "Shipped", "collected", "usual_data", "with_new_dynamics"]

SHORT = {
    "LQR-v0": "lqr",
    "CarUMaze-v0": "car",
    "ConstrainedPendulum-v0": "pendulum",
    "LatentPendulum-v0": "latent",
}
_SIZES = ("unet", "dynamics_unet", "value_unet")
_NOT_OF_WEIGHTS = ("sampling", "seed")  # fields that a network's key leaves out


def collected(dataset_id: str) -> EpisodeSource:
    """Load a data set of the package, or make it first."""
    try:
        return load_episodes(dataset_id, download=False)
    except DataError:
        return load_episodes(collect(dataset_id))


@final
@dataclass(frozen=True)
class Data:
    """A data set, as a network sees it.

    Attributes:
        dataset_id: A recipe of `mpd_gym.collect.recipes`.
        state_noise: Standard deviation of Gaussian noise on every recorded state, in the
            environment's units (paper, appendix F).
        safe: Keep only episodes without cost.
        encoder: Environment whose shipped encoder turns frames into latents; empty for none.
        first: Number of episodes that are kept, the first ones; 0 for all.
    """

    dataset_id: str
    state_noise: float = 0.0
    safe: bool = False
    encoder: str = ""
    first: int = 0

    def open(self, cache: Path) -> EpisodeSource:
        """Load the episodes, or make them first.

        Args:
            cache: Folder for latents.
        """
        source = collected(self.dataset_id)
        if self.first:
            source = source.select(range(min(self.first, len(source))))
        if self.safe:
            source = source.where(cost_at_most(0))
        if self.state_noise:
            source = _noisy(source, self.state_noise)
        if self.encoder:
            encoder = ImageEncoder.load(self.encoder)
            path = cache / f"latents-{encoder.digest}.safetensors"
            source = encode_episodes(source, encoder, cache=path, progress=True)
        return source


@final
@dataclass(frozen=True)
class Network:
    """What defines a trained agent.

    Attributes:
        env_id: Environment, which names preset and usual data.
        seed: Of weights, data split, batches and noise.
        method: A key of `mpd_gym.agents.AGENTS`.
        preset: ``"laptop"`` or ``"paper"``.
        data: What all models learn from; empty for the environment's usual data.
        dynamics_data: Other data for the dynamics model; empty for the same.
        changes: Fields of the preset's configuration that differ; those that a method does not have
            are left out.
        planner: Network whose planner this one keeps: only the dynamics model is trained.
    """

    env_id: str
    seed: int
    method: str = "mpdiffuser"
    preset: str = "laptop"
    data: tuple[Data, ...] = ()
    dynamics_data: tuple[Data, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    planner: Network | None = None

    @property
    def config(self) -> AgentConfig:
        """Configuration of the agent."""
        config = preset(self.preset, self.env_id, self.method)
        names = {entry.name for entry in fields(config)}
        # As published: plans' own actions are executed where there are any.
        changes = {"inverse_dynamics": self.method == "decision_diffuser", **self.changes}
        config = replace(config, **{key: changes[key] for key in changes if key in names})
        return replace(
            config,
            seed=self.seed,
            training=replace(config.training, seed=self.seed),
            regressor_training=replace(config.regressor_training, seed=self.seed),
        )

    @property
    def sources(self) -> tuple[tuple[Data, ...], tuple[Data, ...]]:
        """Data of the planner, and of the dynamics model."""
        planner, dynamics = usual_data(self.env_id) if not self.data else (self.data, self.data)
        return planner, self.dynamics_data or dynamics

    @property
    def name(self) -> str:
        """Of its file, without the ending."""
        short = SHORT.get(self.env_id, self.env_id)
        if self.env_id in DATASETS and self.digest == Network(self.env_id, self.seed).digest:
            return f"{short}-seed{self.seed}"
        return f"{short}-{self.method}-{self.digest}-seed{self.seed}"

    @property
    def digest(self) -> str:
        """8 hexadecimal digits that differ where anything but the seed does."""
        config = asdict(self.config)
        for part in ("training", "regressor_training"):
            config[part].pop("seed")
        for part in _SIZES:  # a field that came later counts where it is set
            if config.get(part) and not config[part]["causal"]:
                config[part].pop("causal")
        for spec in config["conditions"]:
            if spec["when"] == "always":
                spec.pop("when")
        if self.method == "decision_diffuser" and config["initial_state"] == "inpaint":
            config.pop("initial_state")
        if config.get("dynamics_prediction") is None:
            config.pop("dynamics_prediction", None)
        if not config.get("inverse_dynamics"):
            config.pop("inverse_dynamics", None)
            config.pop("inverse_hidden", None)
        content = {
            "method": self.method,
            "config": {key: config[key] for key in config if key not in _NOT_OF_WEIGHTS},
            "data": [[_told(part) for part in side] for side in self.sources],
            "planner": None if self.planner is None else self.planner.digest,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]

    def path(self, folder: Path) -> Path:
        """The agent's file in a folder of agents."""
        return folder / f"{self.name}.safetensors"

    def train(self, folder: Path, *, parallel: bool = True) -> None:
        """Train the agent if its file is missing; an interrupted training goes on.

        Args:
            folder: Of agents; checkpoints lie in a folder beside the file.
            parallel: Train two of its models at a time.
        """
        path = self.path(folder)
        if path.exists():
            return
        if self.planner is not None:
            self.planner.train(folder, parallel=parallel)
        agent = self._fitted(folder, path.with_suffix(""), parallel)
        agent.save(path)

    def _fitted(self, folder: Path, directory: Path, parallel: bool) -> TrainedAgent[Any]:
        planner, dynamics = ([part.open(folder) for part in side] for side in self.sources)
        if self.changes.get("inverse_dynamics") and self.method != "decision_diffuser":
            before = self._without_inverse(folder, parallel)
            assert isinstance(before, DiffusionAgent)
            return before.with_inverse_dynamics(
                planner, training=self.config.regressor_training, directory=directory
            )
        if self.planner is not None:
            known = MPDiffuserAgent.load(self.planner.path(folder), device="cpu")
            config: Any = self.config
            return with_new_dynamics(known, dynamics, config, directory=directory)
        return agent_class(self.method).fit(
            planner,
            self.config,
            dynamics_dataset=None if self.sources[0] == self.sources[1] else dynamics,
            directory=directory,
            parallel=parallel and len(self.config.roles()) > 1,
        )

    def _without_inverse(self, folder: Path, parallel: bool) -> TrainedAgent[Any]:
        """The same agent before it learned inverse dynamics."""
        changes = {key: self.changes[key] for key in self.changes if key != "inverse_dynamics"}
        base = replace(self, changes=changes)
        base.train(folder, parallel=parallel)
        return base.load(folder)

    def load(self, folder: Path) -> TrainedAgent[Any]:
        """Load the agent, which must be trained."""
        return load_agent(self.path(folder), "cpu")


@final
@dataclass(frozen=True)
class Shipped:
    """An agent's file that is there already; takes the place of a `Network`.

    Attributes:
        env_id: Environment.
        path: The file.
        method: What is in it.
    """

    env_id: str
    path: Path
    method: str = "mpdiffuser"

    @property
    def name(self) -> str:
        """Differs where the file does."""
        return f"{self.env_id}-{hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]}"

    def train(self, folder: Path, *, parallel: bool = True) -> None:
        """Nothing is to be trained."""

    def load(self, folder: Path) -> TrainedAgent[Any]:
        """Load the agent."""
        return load_agent(self.path, "cpu")


def with_new_dynamics(
    agent: MPDiffuserAgent,
    dataset: Any,
    config: MPDiffuserConfig,
    *,
    directory: Path | None = None,
    progress: bool = True,
) -> MPDiffuserAgent:
    """Train another dynamics model beside an agent's planner.

    The second agent shares planner, ranking models, normalisers and condition scalings; the first
    stays as it is.

    Args:
        agent: The first one.
        dataset: As in `fit`; what the new dynamics model learns from.
        config: Of the second agent. It may differ in what concerns the dynamics model, such as
            `dynamics_conditions`.
        directory: Where checkpoints and TensorBoard files go; None keeps nothing.
        progress: Show a progress bar.

    Raises:
        ConfigError: If the configuration asks for another planner.
    """
    sizes, planner = agent.parts.sizes, agent.models["planner"].config
    settled = {spec.name: spec for spec in agent.config.conditions}
    conditions = tuple(
        spec if spec.is_settled else settled.get(spec.name, spec)
        for spec in config.conditions
        if spec.when == "always" or spec.name in settled
    )
    config = replace(config, conditions=conditions).resolved(sizes)
    same = config.denoiser("planner", sizes) == planner
    if not same or config.loss.prediction != agent.config.loss.prediction:
        raise ConfigError(
            "config: the new dynamics model would stand beside another planner; expected "
            f"fields that give {planner} which predicts {agent.config.loss.prediction}"
        )
    models = {**agent.models, "dynamics": config.models(sizes)["dynamics"]}
    made = MPDiffuserAgent(replace(agent.parts, config=config, models=models))
    made.follow(agent)
    made.finetune_dynamics(
        dataset, config.training.steps, name="dynamics", directory=directory, progress=progress
    )
    return made


def _told(data: Data) -> dict[str, Any]:
    """Fields of data that count for a digest; one that came later counts where it is set."""
    told = asdict(data)
    if not data.first:
        told.pop("first")
    return told


def usual_data(env_id: str) -> tuple[tuple[Data, ...], tuple[Data, ...]]:
    """What planner and dynamics model of an environment usually learn from."""
    planner, dynamics = DATASETS[env_id]
    return tuple(map(Data, planner)), tuple(map(Data, dynamics or planner))


def _noisy(source: EpisodeSource, scale: float) -> EpisodeSource:
    """Episodes whose states are measured with noise, the same whenever they are read."""
    rng = np.random.default_rng(0)
    episodes = []
    for episode in source:
        states = np.asarray(episode.observations, float)
        noise = rng.normal(0.0, scale, states.shape)
        episodes.append(replace(episode, observations=states + noise))
    name = f"{source.name} (states with noise of {scale:g})"
    return MemorySource(episodes, source.metadata, name=name)
