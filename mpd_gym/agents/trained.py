"""What all agents that learn have in common: `fit`, `save` and `load`, whatever the method."""

from __future__ import annotations

import os
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self, TypeVar

from torch import nn

from mpd_gym.agents.base import Agent
from mpd_gym.agents.config import INVERSE_DYNAMICS, AgentConfig, Sizes
from mpd_gym.agents.fitting import Dataset, Job, as_data, fit_scalings, look_over, train_models
from mpd_gym.agents.losses import MLPTask, RegressionTask, TrainingTask
from mpd_gym.agents.serialization import (
    AgentParts,
    StoredAgent,
    described,
    read_agent,
    write_agent,
)
from mpd_gym.agents.spaces import Spaces
from mpd_gym.datasets import EpisodeSource
from mpd_gym.errors import ConfigError
from mpd_gym.latent.data import encoder_of
from mpd_gym.models import Regressor
from mpd_gym.models.device import find_device
from mpd_gym.training import TrainingConfig, TrainingResult

__all__ = ["TrainedAgent"]

C = TypeVar("C", bound=AgentConfig)

DYNAMICS = {"dynamics", "successor"}
"""Models that learn from `dynamics_dataset` where `fit` is given one."""
AUXILIARY = {INVERSE_DYNAMICS, "successor"}
"""Models that are trained as `regressor_training` says, as reward, cost and termination are."""


class TrainedAgent(Agent[C]):
    """An agent whose models are learned offline and kept in one file.

    Make one with `fit` or `load`. See `mpd_gym.agents.base.Agent` for `predict`, `plan`,
    `with_options` and the functions that can be set at run time.

    Args:
        parts: What it is made of.
    """

    config_type: ClassVar[type[AgentConfig]]
    """Class of its configuration."""

    @abstractmethod
    def _task(self, role: str) -> TrainingTask:
        """Examples and loss of one of the method's own networks."""

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
            DataError: If the data is damaged or lacks what the configuration needs. What is only
                suspicious is a warning (see `mpd_gym.datasets.check_data`).
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
        others = sources if dynamics_dataset is None else as_data(dynamics_dataset, sources[0])
        first = sources[0].metadata
        encoder = encoder_of((*sources, *others))
        spaces = Spaces(first["observation_space"], first["action_space"], encoder)
        config = _settled(config, sources, goals=spaces.goal_size > 0)
        look_over(sources, others, config)
        normalizers, conditions = fit_scalings(sources, others, config, condition_functions or {})
        sizes = Sizes(spaces.nx, spaces.nu, conditions.sizes)
        config = config.resolved(sizes)
        models = config.models(sizes)
        agent = cls(AgentParts(config, models, spaces, normalizers, conditions, device=where))
        jobs = [agent._job(role, others if role in DYNAMICS else sources) for role in models]
        agent._take(
            train_models(jobs, directory, resume=resume, parallel=parallel, progress=progress)
        )
        return agent

    def _job(
        self,
        role: str,
        sources: tuple[EpisodeSource, ...],
        settings: TrainingConfig | None = None,
        name: str = "",
    ) -> Job:
        """Training of one model, under its role's name and with the configuration's settings."""
        model, config = self.models[role], self.config
        task: TrainingTask
        if isinstance(model, Regressor):
            goal = config.condition("goal")
            task = RegressionTask(model.config.target, "" if goal is None else goal.name)
        elif role == INVERSE_DYNAMICS:
            task = MLPTask(role)
        else:
            task = self._task(role)
        if settings is None:
            auxiliary = isinstance(model, Regressor) or role in AUXILIARY
            settings = config.regressor_training if auxiliary else config.training
        parts = replace(self.parts, models={role: model})
        return Job(role, name or role, task, sources, settings, parts)

    def _beside(self, config: C, models: Mapping[str, nn.Module]) -> Self:
        """A second agent with other models in some roles, which shares everything else."""
        made = type(self)(replace(self.parts, config=config, models={**self.models, **models}))
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
        write_agent(path, self.name, self.parts, self.options)

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
        config_type: Any = cls.config_type
        found = find_device(device)
        with described(stored.source):
            agent = cls(stored.parts(config_type, found))
        return agent.with_options(**options) if options else agent


def _settled(config: C, sources: tuple[EpisodeSource, ...], *, goals: bool) -> C:
    """Decide what conditions leave to the data; warn where goals would not be seen."""
    longest = max(int(source.lengths.max()) for source in sources)
    conditions = config.windows.settled(longest, goals=goals).conditions
    if goals and not {"goal", "custom"} & {spec.kind for spec in conditions}:
        warnings.warn(
            "conditions: observations have a desired_goal that the agent will not see; add "
            "ConditionSpec('goal')",
            stacklevel=3,
        )
    return replace(config, conditions=conditions)
