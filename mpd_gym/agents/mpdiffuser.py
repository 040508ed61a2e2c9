"""Model Predictive Diffuser (Balim, Li and Du, arXiv 2512.08280)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Self, final

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from mpd_gym.agents.base import Agent
from mpd_gym.agents.files import read_agent, write_agent
from mpd_gym.agents.learning import (
    Dataset,
    DenoisingTask,
    Job,
    RegressionTask,
    TrainingData,
    as_data,
    train_modules,
)
from mpd_gym.agents.mpdiffuser_config import MPDiffuserConfig
from mpd_gym.agents.objective import learned_objective
from mpd_gym.agents.observations import ObservationReader, action_size
from mpd_gym.agents.request import Request
from mpd_gym.datasets import FittedConditions, Normalizers
from mpd_gym.diffusion import (
    Parts,
    compose,
    guided,
    inpaint,
    inpaint_denoiser,
    make_move,
    make_schedule,
    noise_to_level,
    sample,
    start_noise,
)
from mpd_gym.models import (
    Regressor,
    RegressorConfig,
    TrajectoryDenoiser,
)
from mpd_gym.training import TrainingConfig, TrainingResult
from mpd_gym.types import Denoiser

__all__ = ["MPDiffuserAgent", "MPDiffuserConfig"]


@final
class MPDiffuserAgent(Agent):
    """Planner and dynamics model sample candidate plans together; a ranker picks one.

    Make one with `fit` or `load`. See `mpd_gym.agents.base.Agent` for `predict`, `plan`,
    `with_options` and the functions that can be set at run time.

    Args:
        config: Its configuration.
        models: ``"planner"``, ``"dynamics"`` and the other models of `config.roles()`.
        observation_space: The environment's.
        action_space: The environment's.
        normalizers: Of observations, actions and goals.
        conditions: With the scaling of the training data.
        history: What it was trained on and how, JSON values.
        device: Of the models.
    """

    name = "mpdiffuser"

    def __init__(
        self,
        config: MPDiffuserConfig,
        models: Mapping[str, nn.Module],
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        normalizers: Normalizers,
        conditions: FittedConditions,
        *,
        history: Mapping[str, Any] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config = config
        self.models = {role: model.to(device).eval() for role, model in models.items()}
        self.history = dict(history or {})
        self._schedule = make_schedule(config.schedule, config.diffusion_steps)
        self._nx = ObservationReader(observation_space).size
        bounds = zip(normalizers.observation.clip_range, normalizers.action.clip_range, strict=True)
        low, high = (np.concatenate(pair) for pair in bounds)
        self._clip = (
            torch.as_tensor(low, dtype=torch.float32, device=device),
            torch.as_tensor(high, dtype=torch.float32, device=device),
        )
        super().__init__(
            observation_space,
            action_space,
            normalizers,
            conditions,
            learned_objective(config.discount, self.models, normalizers, torch.device(device)),
            config.sampling,
            trajectory_shape=(config.horizon, self._nx + action_size(action_space)),
            horizon=config.plan_horizon,
            num_levels=config.diffusion_steps,
            seed=config.seed,
            device=torch.device(device),
        )

    # --- sampling ------------------------------------------------------------------------------

    def _sample(self, request: Request) -> Tensor:
        options = self.options
        levels = self._schedule.levels(options.num_steps)
        if request.warm is not None:
            levels = levels[-options.warm_start_steps :]
        planner, dynamics = self._denoisers(request, levels)
        step = compose(
            options.composition,
            Parts(
                planner,
                dynamics,
                self._schedule,
                self._nx,
                make_move(options.sampler, options.eta),
                options.temperature,
            ),
            dynamics_weight=options.dynamics_weight,
            dynamics_levels=options.dynamics_levels,
        )
        if request.warm is None:
            start = start_noise(request.noise, options.temperature)
        else:
            warm = request.warm.repeat_interleave(options.num_candidates, 0)
            start = noise_to_level(
                warm, levels[0], self._schedule, request.noise, options.temperature
            )
        if self.config.initial_state == "inpaint":
            mask, values = self._known(request.initial)
            step = inpaint(step, mask, values)
        return sample(step, start, levels, request.noise)

    def _denoisers(
        self, request: Request, levels: Sequence[int]
    ) -> tuple[Denoiser, Denoiser | None]:
        """Planner and dynamics model, bound to the observations and conditions of a request."""
        roles = ["planner"]
        if self.options.composition != "planner_only":
            roles.append("dynamics")
        found: list[Denoiser] = []
        for role in roles:
            model = self.models[role]
            assert isinstance(model, TrajectoryDenoiser)
            conditioned = bool(model.config.conditions)
            denoiser = guided(
                model,
                self._schedule,
                request.initial,
                request.conditions if conditioned else request.conditions[:, :0],
                request.present if conditioned else request.present[:, :0],
                self.options.guidance_scale,
                levels=levels,
                prediction=self.config.loss.prediction,
                clip=self._clip,
            )
            if self.config.initial_state == "inpaint":
                denoiser = inpaint_denoiser(denoiser, *self._known(request.initial))
            found.append(denoiser)
        return found[0], found[1] if len(found) > 1 else None

    def _known(self, initial: Tensor) -> tuple[Tensor, Tensor]:
        """Entries that hold x_0 where it is inpainted: mask ``[L, D]``, values ``[M, L, D]``."""
        length, width = self._trajectory_shape
        mask = torch.zeros(length, width, dtype=torch.bool, device=self.device)
        mask[0, : self._nx] = True
        values = torch.zeros(len(initial), length, width, device=self.device)
        values[:, 0, : self._nx] = initial
        return mask, values.repeat_interleave(self.options.num_candidates, 0)

    def _split(self, trajectories: Tensor) -> tuple[Tensor, Tensor]:
        states, actions = trajectories[..., : self._nx], trajectories[..., self._nx :]
        if self.config.initial_state == "film":
            return states, actions
        return states[:, 1:], actions[:, :-1]

    # --- training ------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        dataset: Dataset,
        config: MPDiffuserConfig | None = None,
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
            dynamics_dataset: Other data for the dynamics model, such as
                ``[expert_id, random_id]``.
            condition_functions: ``{name: function(episode) -> [T, size]}`` for conditions of kind
                ``"custom"``.
            directory: Where checkpoints and TensorBoard files go; None keeps nothing.
            device: ``"auto"`` takes a GPU where there is one.
            resume: Continue from checkpoints in `directory`.
            parallel: Train planner and dynamics model side by side, in two processes with one
                thread each. A script then needs ``if __name__ == "__main__":`` around the call.
            progress: Show progress bars.

        Raises:
            DataError: If the data is damaged or lacks what the configuration needs.
            ConfigError: If the configuration does not fit the data.
            TrainingError: If a loss becomes non-finite.
            KeyboardInterrupt: After Ctrl-C, with everything saved.
        """
        config = config or MPDiffuserConfig()
        where = _device(device)
        sources = as_data(dataset)
        others = sources if dynamics_dataset is None else as_data(dynamics_dataset)
        data = TrainingData.prepare(
            sources,
            others,
            config.windows,
            config.normalizer,
            condition_functions or {},
            config.validation_fraction,
            config.seed,
        )
        space, actions = (
            sources[0].metadata[f"{part}_space"] for part in ("observation", "action")
        )
        models = _modules(
            config,
            ObservationReader(space).size,
            action_size(actions),
            data.conditions.sizes,
        )
        agent = cls(config, models, space, actions, data.normalizers, data.conditions, device=where)
        jobs = [
            agent._job(role, data if role != "dynamics" else replace(data, sources=others))
            for role in models
        ]
        results = train_modules(
            jobs, directory, where, resume=resume, parallel=parallel, progress=progress
        )
        agent._take(results)
        return agent

    def finetune_dynamics(
        self,
        dataset: Dataset,
        steps: int,
        *,
        training: TrainingConfig | None = None,
        directory: str | os.PathLike[str] | None = None,
        resume: bool = True,
        progress: bool = True,
    ) -> TrainingResult:
        """Train the dynamics model further on other data; every other weight keeps its bits.

        Args:
            dataset: As in `fit`. Normalisers and condition scalings stay.
            steps: Optimisation steps.
            training: Other settings; the configuration's by default. Its `steps` are not read.
            directory: Where checkpoints and TensorBoard files go; None keeps nothing.
            resume: Continue from a checkpoint in `directory`.
            progress: Show a progress bar.

        Returns:
            The losses.
        """
        settings = replace(training or self.config.training, steps=steps)
        config = self.config
        held_out = (config.validation_fraction, config.seed)
        data = TrainingData(
            as_data(dataset), config.windows, self.normalizers, self.conditions, *held_out
        )
        job = replace(self._job("dynamics", data), config=settings, name="dynamics-finetuned")
        results = train_modules([job], directory, self.device, resume=resume, progress=progress)
        self._take(results)
        return results["dynamics"]

    def _job(self, role: str, data: TrainingData) -> Job:
        model = self.models[role]
        if isinstance(model, TrajectoryDenoiser):
            names = tuple(name for name, _ in model.config.conditions)
            task: DenoisingTask | RegressionTask = DenoisingTask(
                self._schedule, self.config.loss, names, self.config.initial_state, self.device
            )
            return Job(role, role, model, task, data, self.config.training)
        return Job(role, role, model, RegressionTask(role), data, self.config.regressor_training)

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
        caller's reward, cost and ranking functions cannot be, and a warning says so.

        Raises:
            InputError: If the path does not end in ``.safetensors``.
            CheckpointError: If the disk refuses; an existing file stays as it is.
        """
        if self.has_caller_functions:
            warnings.warn(
                "reward, cost and ranking functions that you set are not saved; set them again "
                "after load",
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
        )

    @classmethod
    def load(
        cls, source: str | os.PathLike[str], device: str = "auto", **options: Any
    ) -> MPDiffuserAgent:
        """Read an agent. Needs no data set and no environment, and runs no code from the file.

        Args:
            source: Path of a file that `save` wrote, or the id of an agent that ships with the
                package, such as ``"CarUMaze-v0"``.
            device: ``"auto"`` takes a GPU where there is one.
            options: Sampling options other than the saved ones, see `SamplingConfig`.

        Raises:
            CheckpointError: If the file is missing, truncated, tampered with, of another kind, or
                does not match its configuration.
            ConfigError: If an option is unknown or out of range.
        """
        stored = read_agent(source, cls.name)
        config = MPDiffuserConfig.from_json(stored.config)
        normalizers, conditions = stored.scalings(config.normalizer, config.windows)
        reader = ObservationReader(stored.observation_space)
        models = _modules(config, reader.size, action_size(stored.action_space), conditions.sizes)
        stored.load_weights(models)
        agent = cls(
            config,
            models,
            stored.observation_space,
            stored.action_space,
            normalizers,
            conditions,
            history=stored.history,
            device=_device(device),
        )
        return agent.with_options(**options) if options else agent


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _modules(
    config: MPDiffuserConfig, nx: int, nu: int, sizes: Mapping[str, int]
) -> dict[str, nn.Module]:
    """Models with seeded initial weights; the global random state stays as it is."""
    models: dict[str, nn.Module] = {}
    with torch.random.fork_rng(devices=[]):
        for number, role in enumerate(config.roles()):
            torch.manual_seed(config.seed * 1000 + number)
            if role in ("planner", "dynamics"):
                models[role] = TrajectoryDenoiser(config.denoiser(role, nx, nu, sizes))
            else:
                inputs: Any = config.regressor_inputs
                target: Any = role
                models[role] = Regressor(RegressorConfig(nx, nu, target, inputs))
    return models
