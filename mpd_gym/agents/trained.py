"""What all agents that learn have in common: `fit`, `save` and `load`, whatever the method."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from gymnasium import spaces
from torch import nn

from mpd_gym.agents.actions import action_size
from mpd_gym.agents.base import Agent
from mpd_gym.agents.config import AgentConfig
from mpd_gym.agents.fitting import (
    Dataset,
    Job,
    RegressionTask,
    Task,
    TrainingData,
    as_data,
    train_modules,
)
from mpd_gym.agents.losses import MLPTask
from mpd_gym.agents.objective import learned_objective
from mpd_gym.agents.observations import ObservationReader
from mpd_gym.agents.serialization import StoredAgent, read_agent, write_agent
from mpd_gym.datasets import FittedConditions, Normalizers
from mpd_gym.errors import ConfigError
from mpd_gym.latent.data import encoder_of
from mpd_gym.models import MLP, Regressor
from mpd_gym.models.device import find_device
from mpd_gym.training import TrainingResult

__all__ = ["TrainedAgent"]

C = TypeVar("C", bound=AgentConfig)


class TrainedAgent(Agent, Generic[C]):
    """An agent whose models are learned offline and kept in one file.

    Make one with `fit` or `load`. See `mpd_gym.agents.base.Agent` for `predict`, `plan`,
    `with_options` and the functions that can be set at run time.

    Args:
        config: Its configuration.
        models: Networks by role, those of `config.roles()`.
        observation_space: The environment's.
        action_space: The environment's.
        normalizers: Of observations, actions and goals.
        conditions: With the scaling of the training data.
        history: What it was trained on and how, JSON values.
        device: Of the models.
    """

    config_type: ClassVar[type[AgentConfig]]
    """Class of its configuration."""
    dynamics_roles: ClassVar[frozenset[str]] = frozenset()
    """Models that learn from `dynamics_dataset` where `fit` is given one."""
    auxiliary_roles: ClassVar[frozenset[str]] = frozenset()
    """Models that are trained as `regressor_training` says."""

    def __init__(
        self,
        config: C,
        models: Mapping[str, nn.Module],
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        normalizers: Normalizers,
        conditions: FittedConditions,
        *,
        history: Mapping[str, Any] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config: C = config
        self.models = {role: model.to(device).eval() for role, model in models.items()}
        self.history = dict(history or {})
        self._nx = ObservationReader(observation_space).size
        layout = config.layout(self._nx, action_size(action_space), conditions.sizes)
        super().__init__(
            observation_space,
            action_space,
            normalizers,
            conditions,
            learned_objective(config.discount, self.models, normalizers, torch.device(device)),
            config.sampling,
            trajectory_shape=(layout.rows, layout.columns),
            horizon=layout.horizon,
            num_levels=layout.levels,
            seed=config.seed,
            device=torch.device(device),
        )

    def _task(self, role: str) -> Task:
        """Examples and loss of a denoiser or value network."""
        raise NotImplementedError(f"{type(self).__name__} does not say how {role!r} learns")

    # --- training ------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        dataset: Dataset,
        config: C | None = None,
        *,
        dynamics_dataset: Dataset | None = None,
        condition_functions: Mapping[str, Any] | None = None,
        directory: str | os.PathLike[str] | None = None,
        device: str = "auto",
        resume: bool = True,
        parallel: bool = False,
        progress: bool = True,
    ) -> Self:
        """Train an agent offline.

        Interrupted at any time and called again with the same arguments and `directory`, it goes
        on where it was.

        Args:
            dataset: Minari id or data set, flat HDF5 file, episodes, or a list of ids and files:
                what the planner learns from, and the other models too.
            config: Its configuration.
            dynamics_dataset: Other data for the model of the dynamics, such as ``[expert_id,
                random_id]``. A method without one takes it for the normalisers only, so that these
                are the same for all methods.
            condition_functions: ``{name: function(episode) -> [T, size]}`` for conditions of kind
                ``"custom"``.
            directory: Where checkpoints and TensorBoard files go; None keeps nothing.
            device: ``"auto"`` takes a GPU where there is one.
            resume: Continue from checkpoints in `directory`.
            parallel: Train two models side by side, in two processes with one thread each. A
                script then needs ``if __name__ == "__main__":`` around the call.
            progress: Show progress bars.

        Raises:
            DataError: If the data is damaged or lacks what the configuration needs.
            ConfigError: If the configuration does not fit the data or the agent, or there is no
                data or no such device.
            TrainingError: If a loss becomes non-finite.
            KeyboardInterrupt: After Ctrl-C, with everything saved.
        """
        config = config or cls.config_type()  # type: ignore[assignment]
        if not isinstance(config, cls.config_type):
            raise ConfigError(
                f"config: {cls.__name__} needs a {cls.config_type.__name__}, got "
                f"{type(config).__name__}"
            )
        where = find_device(device)
        sources = as_data(dataset)
        others = sources if dynamics_dataset is None else as_data(dynamics_dataset)
        encoder = encoder_of((*sources, *others))
        longest = max(int(source.lengths.max()) for source in sources)
        space, actions = (
            sources[0].metadata[f"{part}_space"] for part in ("observation", "action")
        )
        config = _settled(config, longest, goals=ObservationReader(space).goal_size > 0)
        data = TrainingData.prepare(
            sources,
            others,
            config.windows,
            config.normalizer,
            condition_functions or {},
            config.validation_fraction,
            config.seed,
        )
        nx, nu = ObservationReader(space).size, action_size(actions)
        config = config.resolved(nx, nu, data.conditions.sizes)
        models = config.models(nx, nu, data.conditions.sizes)
        agent = cls(config, models, space, actions, data.normalizers, data.conditions, device=where)
        agent.set_encoder(encoder)
        other_data = replace(data, sources=others)
        jobs = [
            agent._job(role, other_data if role in cls.dynamics_roles else data) for role in models
        ]
        results = train_modules(
            jobs, directory, where, resume=resume, parallel=parallel, progress=progress
        )
        agent._take(results)
        return agent

    def _job(self, role: str, data: TrainingData) -> Job:
        model, config = self.models[role], self.config
        if isinstance(model, Regressor):
            goal = config.goal_condition
            task: Task = RegressionTask(model.config.target, "" if goal is None else goal.name)
        elif isinstance(model, MLP):
            task = MLPTask(role)
        else:
            task = self._task(role)
        auxiliary = isinstance(model, Regressor) or role in self.auxiliary_roles
        settings = config.regressor_training if auxiliary else config.training
        return Job(role, role, model, task, data, settings)

    def _beside(self, config: C, models: Mapping[str, nn.Module]) -> Self:
        """A second agent with other models in some roles, which shares everything else."""
        made = type(self)(
            config,
            {**self.models, **models},
            self.observation_space,
            self.action_space,
            self.normalizers,
            self.conditions,
            history=self.history,
            device=self.device,
        )
        made.set_encoder(self.encoder)
        made.follow(self)
        return made

    def _take(self, results: Mapping[str, TrainingResult]) -> None:
        """Keep what a training gave: the weights are in the models already."""
        for role, result in results.items():
            self.models[role].load_state_dict(result.weights)
            entry = {"steps": result.step, "seconds": round(result.seconds, 1)}
            if len(result.validation):
                entry["validation_loss"] = float(result.validation["loss"][-1])
            self.history[result.name] = entry

    # --- files ---------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the agent to one ``.safetensors`` file, whole or not at all.

        Weights, normalisers, spaces, configuration and the present sampling options are kept; a
        caller's functions cannot be, and a warning says so.

        Raises:
            InputError: If the path does not end in ``.safetensors``.
            CheckpointError: If the disk refuses; an existing file stays as it is.
        """
        if self.has_caller_functions:
            warnings.warn(
                "reward, cost, ranking, inverse dynamics and constraint functions that you set are "
                "not saved; set them again after load",
                stacklevel=2,
            )
        config = asdict(replace(self.config, sampling=self.options))
        write_agent(
            path,
            self.name,
            config,
            self.models,
            self.observation_space,
            self.action_space,
            self.normalizers,
            self.conditions,
            self.history,
            self.encoder,
        )

    @classmethod
    def load(cls, source: str | os.PathLike[str], device: str = "auto", **options: Any) -> Self:
        """Read an agent. Needs no data set and no environment, and runs no code from the file.

        Args:
            source: Path of a file that `save` wrote, or the id of an agent that ships with the
                package, such as ``"CarUMaze-v0"``.
            device: ``"auto"`` takes a GPU where there is one.
            options: Sampling options other than the saved ones, see `SamplingConfig`.

        Raises:
            CheckpointError: If the file is missing, truncated, tampered with, of another kind, or
                does not match its configuration.
            ConfigError: If an option is unknown or out of range, or there is no such device.
        """
        return cls.restored(read_agent(source, cls.name), device, **options)

    @classmethod
    def restored(cls, stored: StoredAgent, device: str = "auto", **options: Any) -> Self:
        """Build an agent from the contents of its file; arguments and errors as `load`."""
        config: Any = cls.config_type.from_json(stored.config)
        normalizers, conditions = stored.scalings(config.normalizer, config.windows)
        nx = ObservationReader(stored.observation_space).size
        models = config.models(nx, action_size(stored.action_space), conditions.sizes)
        stored.load_weights(models)
        agent = cls(
            config,
            models,
            stored.observation_space,
            stored.action_space,
            normalizers,
            conditions,
            history=stored.history,
            device=find_device(device),
        )
        agent.set_encoder(stored.encoder)
        return agent.with_options(**options) if options else agent


def _settled(config: C, longest: int, *, goals: bool) -> C:
    """Decide what conditions leave to the data; warn where goals would not be seen."""
    conditions = config.windows.settled(longest, goals=goals).conditions
    if goals and not {"goal", "custom"} & {spec.kind for spec in conditions}:
        warnings.warn(
            "conditions: observations have a desired_goal that the agent will not see; add "
            "ConditionSpec('goal')",
            stacklevel=3,
        )
    return replace(config, conditions=conditions)
