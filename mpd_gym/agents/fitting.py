"""Training the parts of an agent: data to windows, and windows to weights by their losses."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np

from mpd_gym.agents.config import NOT_OF_WEIGHTS, AgentConfig
from mpd_gym.agents.losses import TrainingTask
from mpd_gym.agents.serialization import AgentParts
from mpd_gym.boundary import check_spaces
from mpd_gym.checkpoint import weights_digest
from mpd_gym.datasets import (
    EpisodeSource,
    FittedConditions,
    Normalizers,
    WindowSampler,
    check_data,
    fit_conditions,
    fit_normalizers,
    load_episodes,
    split_episodes,
)
from mpd_gym.datasets.source import array_digest
from mpd_gym.errors import ConfigError
from mpd_gym.models import Regressor
from mpd_gym.training import Sampler, TrainingConfig, TrainingResult, fit, fit_parallel
from mpd_gym.types import Array

__all__ = [
    "Dataset",
    "Job",
    "as_data",
    "fit_scalings",
    "look_over",
    "train_models",
]

Dataset = Any
"""A Minari id or data set, a file, episodes, an `EpisodeSource`, or a sequence of such sources."""


def as_data(dataset: Dataset, like: Any = None) -> tuple[EpisodeSource, ...]:
    """Open one or several data sets that fit together.

    Args:
        dataset: Anything that `load_episodes` takes, or a list of ids, files and sources.
        like: Source or agent whose spaces they must have; None for the first one.

    Raises:
        DataError: If one cannot be read.
        ConfigError: If the list is empty, or spaces differ; names both data sets.
    """
    sources = _opened(dataset)
    first = sources[0] if like is None else like
    for source in sources:
        if source is not first:
            check_spaces(first, source, first.name, remedy="train on data of one environment")
    return sources


def _opened(dataset: Dataset) -> tuple[EpisodeSource, ...]:
    if isinstance(dataset, (list, tuple)) and not dataset:
        raise ConfigError("dataset: expected at least one data set, file or episode; got none")
    if isinstance(dataset, (list, tuple)) and all(
        isinstance(part, (str, EpisodeSource)) for part in dataset
    ):
        return tuple(source for part in dataset for source in _opened(part))
    return (dataset if isinstance(dataset, EpisodeSource) else load_episodes(dataset),)


def look_over(
    sources: tuple[EpisodeSource, ...], others: tuple[EpisodeSource, ...], config: AgentConfig
) -> None:
    """Warn of what `check_data` finds suspicious about the planner's data and the dynamics model's.

    Raises:
        DataError: For what cannot be right.
    """
    look = functools.partial(
        check_data, windows=config.windows, held_out=config.validation_fraction
    )
    reports = [look(part) for part in dict.fromkeys((sources, others))]
    for error in (error for report in reports for error in report.errors):
        raise error
    found = (str(finding) for report in reports for finding in report.warnings)
    for text in dict.fromkeys(found):  # of data that both use, once
        warnings.warn(text, stacklevel=3)


def fit_scalings(
    sources: tuple[EpisodeSource, ...],
    others: Sequence[EpisodeSource],
    config: AgentConfig,
    functions: Mapping[str, Any],
) -> tuple[Normalizers, FittedConditions]:
    """Fit normalisers and the scaling of conditions, which all models share.

    Args:
        sources: The planner's data; conditions are scaled to it.
        others: Data of the dynamics model; with the planner's it sets the normalisers.
        config: Of the agent.
        functions: Of custom conditions.
    """
    extra = [other for other in others if not any(map(other.same_as, sources))]
    normalizers = fit_normalizers([*sources, *extra], config.normalizer)
    return normalizers, fit_conditions(sources, config.windows, normalizers, functions)


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
    """The training of one model; sent to another process where models train in parallel.

    Attributes:
        role: Which model of the agent.
        name: Of the training, and of its folder.
        task: Its examples and loss.
        sources: Episodes that it learns from.
        settings: Of the training.
        parts: Of the agent, with this model alone.
    """

    role: str
    name: str
    task: TrainingTask
    sources: tuple[EpisodeSource, ...]
    settings: TrainingConfig
    parts: AgentParts[Any]

    def windows(self) -> tuple[WindowSampler, WindowSampler | None]:
        """Samplers of training and of held-out windows; None where none are held out."""
        held_out, seed = self.parts.config.validation_fraction, self.parts.config.seed
        if held_out == 0:
            return self._windows(self.sources), None
        pairs = [split_episodes(source, held_out, seed) for source in self.sources]
        train, kept = zip(*pairs, strict=True)
        return self._windows(train), self._windows(kept)

    def _windows(self, sources: Sequence[EpisodeSource]) -> WindowSampler:
        config, parts = self.parts.config, self.parts
        return WindowSampler(sources, config.windows, parts.normalizers, parts.conditions)

    def examples(self, windows: WindowSampler | None) -> Sampler | None:
        """Sampler of the task's examples from windows."""
        if windows is None:
            return None
        return lambda size, rng: self.task.examples(windows.sample(size, rng))

    def identity(self, windows: WindowSampler) -> dict[str, Any]:
        """What the weights depend on beside the settings of the training, JSON values.

        Args:
            windows: What it trains on.
        """
        config, parts = asdict(self.parts.config), self.parts
        normalizers = {
            f"{part}/{key}": array
            for part, normalizer in parts.normalizers._asdict().items()
            if normalizer is not None
            for key, array in normalizer.arrays().items()
        }
        return {
            "data": [source.identity for source in self.sources],
            "config": {name: config[name] for name in config if name not in NOT_OF_WEIGHTS},
            "normalizers": array_digest(normalizers).hex(),
            "conditions": windows.condition_digest,
            "initial_weights": weights_digest(parts.models[self.role]),
        }


def train_models(
    jobs: Sequence[Job],
    directory: str | os.PathLike[str] | None,
    *,
    resume: bool = True,
    parallel: bool = False,
    progress: bool = True,
) -> dict[str, TrainingResult]:
    """Train models one after the other, or in two processes of one thread each.

    Args:
        jobs: One for each model.
        directory: Checkpoints and TensorBoard files go to a folder for each; None keeps nothing.
        resume: Continue from checkpoints.
        parallel: Train two at a time.
        progress: Show progress bars.

    Returns:
        The result of each, by role; its weights are not yet in the caller's modules where the
        training ran in another process.
    """
    runs = {job.role: functools.partial(_run, job, directory, resume, progress) for job in jobs}
    if not parallel:
        return {role: run() for role, run in runs.items()}
    results: dict[str, TrainingResult] = {}
    roles = list(runs)
    for first in range(0, len(roles), 2):
        results |= fit_parallel({role: runs[role] for role in roles[first : first + 2]})
    return results


def _run(
    job: Job, directory: str | os.PathLike[str] | None, resume: bool, progress: bool
) -> TrainingResult:
    module = job.parts.models[job.role]
    if isinstance(module, Regressor) and module.config.target != "termination":
        module.set_target_statistics(*target_statistics(job.sources, module.config.target))
    windows, held_out = job.windows()
    examples = job.examples(windows)
    assert examples is not None
    return fit(
        module,
        job.task,
        examples,
        job.settings,
        name=job.name,
        validation=job.examples(held_out),
        directory=directory,
        device=job.parts.device,
        resume=resume,
        identity=None if directory is None else job.identity(windows),
        progress=progress,
    )
