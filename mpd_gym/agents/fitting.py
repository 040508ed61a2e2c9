"""Training the parts of an agent: data to windows, windows to losses, losses to weights."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import numpy as np
import torch
from torch import Tensor, nn

from mpd_gym.datasets import (
    EpisodeSource,
    FittedConditions,
    Normalizers,
    WindowConfig,
    WindowSampler,
    fit_conditions,
    fit_normalizers,
    load_episodes,
    split_episodes,
)
from mpd_gym.diffusion.loss import Examples, LossConfig, assemble, denoising_loss
from mpd_gym.diffusion.schedule import NoiseSchedule
from mpd_gym.errors import ConfigError
from mpd_gym.models import Regressor, TrajectoryDenoiser, regression_loss
from mpd_gym.models.backends.choice import training_forward
from mpd_gym.training import TrainingConfig, TrainingResult, fit, fit_parallel
from mpd_gym.types import Array, Batch

__all__ = [
    "Dataset",
    "DenoisingTask",
    "Job",
    "RegressionTask",
    "Task",
    "TrainingData",
    "as_data",
    "train_modules",
]

Dataset = Any
"""A Minari id or data set, a file, episodes, an `EpisodeSource`, or a sequence of such sources."""


def as_data(dataset: Dataset) -> tuple[EpisodeSource, ...]:
    """Open one or several data sets.

    Args:
        dataset: Anything that `load_episodes` takes, or a list of ids, files and sources.

    Raises:
        DataError: If one cannot be read.
        ConfigError: If the list is empty.
    """
    if isinstance(dataset, (list, tuple)) and not dataset:
        raise ConfigError("dataset: expected at least one data set, file or episode; got none")
    if isinstance(dataset, (list, tuple)) and all(
        isinstance(part, (str, EpisodeSource)) for part in dataset
    ):
        return tuple(source for part in dataset for source in as_data(part))
    return (dataset if isinstance(dataset, EpisodeSource) else load_episodes(dataset),)


@final
@dataclass(frozen=True)
class TrainingData:
    """What one model learns from, and how its windows are made.

    Attributes:
        sources: Episodes.
        windows: Shape of the windows.
        normalizers: Of observations, actions and goals.
        conditions: Fitted to the planner's data.
        held_out: Share of the episodes kept for validation, in [0, 1).
        seed: Of the choice of those.
    """

    sources: tuple[EpisodeSource, ...]
    windows: WindowConfig
    normalizers: Normalizers
    conditions: FittedConditions
    held_out: float
    seed: int

    @classmethod
    def prepare(
        cls,
        sources: Sequence[EpisodeSource],
        others: Sequence[EpisodeSource],
        windows: WindowConfig,
        normalizer: str,
        functions: Mapping[str, Any],
        held_out: float,
        seed: int,
    ) -> TrainingData:
        """Fit what all models share, and take the planner's data.

        Args:
            sources: The planner's data; conditions are scaled to it.
            others: Data of the dynamics model; with the planner's it sets the normalisers.
            windows: Shape of the windows.
            normalizer: Kind of the normalisers.
            functions: Of custom conditions.
            held_out: Share of the episodes kept for validation.
            seed: Of the choice of those.
        """
        names = {source.name for source in sources}
        extra = [source for source in others if source.name not in names]
        normalizers = fit_normalizers([*sources, *extra], normalizer)
        conditions = fit_conditions(tuple(sources), windows, normalizers, functions)
        return cls(tuple(sources), windows, normalizers, conditions, held_out, seed)

    def split(self) -> tuple[WindowSampler, WindowSampler | None]:
        """Samplers of training and of held-out windows."""
        if self.held_out == 0:
            return self._sampler(self.sources), None
        pairs = [split_episodes(source, self.held_out, self.seed) for source in self.sources]
        train, kept = zip(*pairs, strict=True)
        return self._sampler(train), self._sampler(kept)

    def _sampler(self, sources: Sequence[EpisodeSource]) -> WindowSampler:
        return WindowSampler(sources, self.windows, self.normalizers, self.conditions)


class Task(Protocol):
    """How a model learns from windows; sent to another process where models train in parallel."""

    def sampler(self, windows: WindowSampler) -> Any:
        """Function of batch size and random numbers that gives examples."""
        ...

    def __call__(
        self, module: nn.Module, batch: Any, generator: torch.Generator, /
    ) -> dict[str, Tensor]:
        """Loss of one batch of examples, whose arrays are tensors here."""
        ...


@final
@dataclass(frozen=True)
class DenoisingTask:
    """How a planner or dynamics model learns from windows.

    Attributes:
        schedule: Noise schedule.
        loss: Options of the denoising loss.
        names: Conditions that the network sees, in its order.
        initial_state: Layout of the trajectories.
        device: Where the examples are wanted.
        actions_given: Whether the network sees the actions without noise.
        rearrange: From windows to windows of other columns; None leaves them.
    """

    schedule: NoiseSchedule
    loss: LossConfig
    names: tuple[str, ...]
    initial_state: str
    device: torch.device
    actions_given: bool = False
    rearrange: Callable[[Batch], Batch] | None = None

    def sampler(self, windows: WindowSampler) -> Any:
        """Function of batch size and random numbers that gives examples."""

        def sample(batch_size: int, rng: np.random.Generator) -> Examples:
            batch = windows.sample(batch_size, rng)
            return assemble(
                batch if self.rearrange is None else self.rearrange(batch),
                self.names,
                initial_state=self.initial_state,
                actions_given=self.actions_given,
                device=self.device,
            )

        return sample

    def __call__(
        self, module: nn.Module, examples: Examples, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Loss of one batch."""
        assert isinstance(module, TrajectoryDenoiser)
        network = training_forward(module)
        return {"loss": denoising_loss(network, examples, self.schedule, self.loss, generator)}


@final
@dataclass(frozen=True)
class RegressionTask:
    """How a reward, cost, violation or termination model learns from windows.

    Attributes:
        target: As in `RegressorConfig`.
        goal: Name of the condition that is the goal; empty for none.
    """

    target: str
    goal: str = ""

    def sampler(self, windows: WindowSampler) -> Any:
        """Function of batch size and random numbers that gives windows."""
        return windows.sample

    def __call__(
        self, module: nn.Module, batch: Any, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Loss of one `Batch`, whose arrays are tensors here."""
        assert isinstance(module, Regressor)
        before = torch.cat([batch.initial[:, None], batch.observations[:, :-1]], dim=1)
        targets = {
            "reward": batch.rewards,
            "cost": batch.costs,
            "violation": batch.costs,
            "termination": batch.terminations,
        }[self.target]
        inputs = [before, batch.actions, batch.observations]
        if self.goal:
            goals = batch.conditions[self.goal]
            inputs.append(goals[:, None].expand(-1, before.shape[1], -1))
        return {"loss": regression_loss(module, inputs, targets, batch.mask)}


def target_statistics(sources: Sequence[EpisodeSource], target: str) -> tuple[float, float]:
    """Mean and standard deviation of the rewards or costs of every step.

    Raises:
        ConfigError: If the data has no costs but a cost model is wanted, or costs other than 0 and
            1 where they are to be learned as violations.
    """
    values: list[Array] = []
    for source in sources:
        for index in range(len(source)):
            episode = source.episode(index)
            series = episode.rewards if target == "reward" else episode.costs
            if series is None:
                raise ConfigError(
                    f"cost_model: {source.name} has no costs; set cost_model=False, or record "
                    "an environment that gives info['cost']"
                )
            values.append(np.asarray(series, float))
    joined = np.concatenate(values)
    if target == "violation" and not np.isin(joined, (0.0, 1.0)).all():
        raise ConfigError(
            f"binary_costs: expected costs of 0 and 1 only, got costs from {joined.min():g} to "
            f"{joined.max():g}; set binary_costs=False"
        )
    return float(joined.mean()), float(joined.std())


@final
@dataclass(frozen=True)
class Job:
    """The training of one model.

    Attributes:
        role: Which model of the agent.
        name: Of the training, and of its folder.
        module: The model.
        task: Its examples and loss.
        data: What it learns from.
        config: Settings of the training.
    """

    role: str
    name: str
    module: nn.Module
    task: Task
    data: TrainingData
    config: TrainingConfig


def train_modules(
    jobs: Sequence[Job],
    directory: str | os.PathLike[str] | None,
    device: torch.device,
    *,
    resume: bool = True,
    parallel: bool = False,
    progress: bool = True,
) -> dict[str, TrainingResult]:
    """Train models one after the other, or in two processes of one thread each.

    Args:
        jobs: One for each model.
        directory: Checkpoints and TensorBoard files go to a folder for each; None keeps nothing.
        device: Of modules and batches.
        resume: Continue from checkpoints.
        parallel: Train two at a time.
        progress: Show progress bars.

    Returns:
        The result of each, by role; its weights are not yet in the caller's modules where the
        training ran in another process.
    """
    runs = {
        job.role: functools.partial(_run, job, directory, device, resume, progress) for job in jobs
    }
    if not parallel:
        return {role: run() for role, run in runs.items()}
    results: dict[str, TrainingResult] = {}
    roles = list(runs)
    for first in range(0, len(roles), 2):
        results |= fit_parallel({role: runs[role] for role in roles[first : first + 2]})
    return results


def _run(
    job: Job,
    directory: str | os.PathLike[str] | None,
    device: torch.device,
    resume: bool,
    progress: bool,
) -> TrainingResult:
    module = job.module
    if isinstance(module, Regressor) and module.config.target != "termination":
        module.set_target_statistics(*target_statistics(job.data.sources, module.config.target))
    windows, held_out = job.data.split()
    return fit(
        module,
        job.task,
        job.task.sampler(windows),
        job.config,
        name=job.name,
        validation=None if held_out is None else job.task.sampler(held_out),
        directory=directory,
        device=device,
        resume=resume,
        identity={"data": [source.identity for source in job.data.sources]},
        progress=progress,
    )
