"""What all agents that sample by diffusion have in common: the reverse pass and its parts."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from mpd_gym.agents.config import INVERSE_DYNAMICS, DiffusionConfig
from mpd_gym.agents.fitting import Dataset, DenoisingTask, TrainingData, as_data, train_modules
from mpd_gym.agents.options import SamplingConfig
from mpd_gym.agents.request import Request, condition_columns
from mpd_gym.agents.trained import TrainedAgent
from mpd_gym.datasets import FittedConditions, Normalizers
from mpd_gym.diffusion import (
    PLANNER_COMPOSITIONS,
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
    with_history,
)
from mpd_gym.errors import ConfigError
from mpd_gym.models import TrajectoryDenoiser
from mpd_gym.models.backends.choice import InferenceNetworks
from mpd_gym.models.backends.threads import enough_threads, multiplications, threads
from mpd_gym.training import TrainingConfig
from mpd_gym.types import Array, Denoiser, Step

__all__ = ["DiffusionAgent", "Known"]

C = TypeVar("C", bound=DiffusionConfig)


class Known(NamedTuple):
    """Entries of a trajectory that are given.

    Attributes:
        mask: True where an entry is given, ``[L, D]``.
        values: ``[M, L, D]``, read under the mask only.
    """

    mask: Tensor
    values: Tensor


class DiffusionAgent(TrainedAgent[C]):
    """An agent that samples its candidates by diffusion; see `TrainedAgent` for the arguments."""

    auxiliary_roles = frozenset({INVERSE_DYNAMICS})

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
        self._schedule = make_schedule(config.schedule, config.diffusion_steps)
        self._networks = InferenceNetworks()  # shared with the agents that `with_options` makes
        super().__init__(
            config,
            models,
            observation_space,
            action_space,
            normalizers,
            conditions,
            history=history,
            device=device,
        )
        low, high = (np.concatenate(parts) for parts in zip(*self._clip_ranges(), strict=True))
        self._clip = (
            torch.as_tensor(low, dtype=torch.float32, device=device),
            torch.as_tensor(high, dtype=torch.float32, device=device),
        )

    # --- what a method supplies -------------------------------------------------------------

    @abstractmethod
    def _step(self, request: Request, levels: Sequence[int]) -> Step:
        """The reverse step of one pass over `levels`."""

    @abstractmethod
    def _clip_ranges(self) -> list[tuple[Array, Array]]:
        """Ranges that x̂_0 is cut to, for each group of columns of a trajectory."""

    # --- sampling ------------------------------------------------------------------------------

    def _sample(self, request: Request) -> Tensor:
        rows = len(request.initial) * self.options.num_samples
        most = max(
            multiplications(model, rows if self._guidance(role) in (0.0, 1.0) else 2 * rows)
            for role, model in self.models.items()
            if isinstance(model, TrajectoryDenoiser)
        )
        with threads(enough_threads(most)):
            return self._sample_within(request)

    def _sample_within(self, request: Request) -> Tensor:
        options = self.options
        levels = self._schedule.levels(options.num_steps, spacing=options.level_spacing)
        if request.warm is not None:
            levels = levels[-options.warm_start_steps :]
        if request.warm is None:
            start = start_noise(request.noise, options.temperature)
        else:
            warm = request.warm.repeat_interleave(options.num_samples, 0)
            start = noise_to_level(
                warm, levels[0], self._schedule, request.noise, options.temperature
            )
        return self._reverse(request, levels, start)

    def _reverse(self, request: Request, levels: Sequence[int], start: Tensor) -> Tensor:
        """Denoise trajectories ``[M, L, D]`` that are at the first of the levels."""
        return sample(self._step(request, levels), start, levels, request.noise)

    def _composed(
        self, request: Request, levels: Sequence[int], known: Known | None = None
    ) -> Step:
        """Step of the composition that the options name, with known entries held everywhere."""
        options = self.options
        alone = options.composition in PLANNER_COMPOSITIONS
        planner = self._denoiser("planner", request, levels, known)
        step = compose(
            options.composition,
            Parts(
                planner,
                None if alone else self._denoiser("dynamics", request, levels, known),
                self._schedule,
                self._nx,
                make_move(options.sampler, options.eta),
                options.temperature,
            ),
            dynamics_weight=options.dynamics_weight,
            dynamics_levels=options.dynamics_levels,
        )
        return step if known is None else inpaint(step, *known)

    def _denoiser(
        self,
        role: str,
        request: Request,
        levels: Sequence[int],
        known: Known | None = None,
        columns: slice = slice(None),
    ) -> Denoiser:
        """A network bound to the observations and conditions of a request.

        Args:
            role: Of the network.
            request: With all conditions.
            levels: At which it will be called.
            known: Entries that are held.
            columns: Of a trajectory that it predicts, or begins with.
        """
        model = self.models[role]
        assert isinstance(model, TrajectoryDenoiser)
        names = [name for name, _ in model.config.conditions]
        values, present = condition_columns(request, self.conditions, names)
        low, high = self._clip
        denoiser = guided(
            self._networks.get(model, self.options.precision),
            self._schedule,
            request.initial,
            values,
            present,
            self._guidance(role),
            levels=levels,
            prediction=self.config.loss_of(role).prediction,
            clip=(low[columns], high[columns]),
        )
        if known is not None:
            denoiser = inpaint_denoiser(denoiser, *known)
        return with_history(self.options.sampler, denoiser, levels, self._schedule)

    def _guidance(self, role: str) -> float:
        """Guidance scale of a network."""
        own = self.options.dynamics_guidance_scale if role == "dynamics" else None
        return self.options.guidance_scale if own is None else own

    def _known(self, initial: Tensor) -> Known | None:
        """Entries that hold x_0, where the method inpaints it.

        Args:
            initial: ``[E, n]``. The first nx columns are x_0 and go to the first row; the others
                hold in every row.
        """
        if self.config.initial_state != "inpaint":
            return None
        length, width = self._trajectory_shape
        columns = initial.shape[-1]
        mask = torch.zeros(length, width, dtype=torch.bool, device=self.device)
        mask[0, : self._nx] = True
        mask[:, self._nx : columns] = True
        values = torch.zeros(len(initial), length, width, device=self.device)
        values[:, :, :columns] = initial[:, None]
        return Known(mask, values.repeat_interleave(self.options.num_samples, 0))

    def _future(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """x_1 … x_H and u_0 … u_{H-1} from the rows of a trajectory."""
        if self.config.initial_state == "film":
            return states, actions
        return states[:, 1:], actions[:, :-1]

    def _executed(self, initial: Tensor, future: Tensor, controls: Tensor) -> Tensor:
        inverse = self.models.get(INVERSE_DYNAMICS)
        if inverse is None or self.options.actions == "planned":
            return controls
        first = initial.repeat_interleave(len(future) // len(initial), 0)[:, None]
        actions: Tensor = inverse(torch.cat((first, future[:, :-1]), dim=1), future)
        return actions

    def _returns(self, trajectories: Tensor) -> Array | None:
        value = self.models.get("value")
        target = self.config.value_condition
        if value is None or target is None:
            return None
        scaling = self.conditions.scalings[target.name]
        k = torch.ones(1, dtype=torch.long, device=self.device)
        with torch.no_grad():
            scaled = np.asarray(value(trajectories, k).float().cpu(), float)
        return scaling.low + (scaling.high - scaling.low) * scaled

    def _check_options(self, options: SamplingConfig) -> None:
        if options.actions == INVERSE_DYNAMICS and INVERSE_DYNAMICS not in self.models:
            raise ConfigError(
                f"actions: the agent has learned no {INVERSE_DYNAMICS}; train it with "
                f"{INVERSE_DYNAMICS}=True in its configuration, or take 'planned'"
            )
        if "dynamics" not in self.models and options.composition not in PLANNER_COMPOSITIONS:
            raise ConfigError(
                f"composition: {self.name!r} has no dynamics model; expected one of "
                f"{sorted(PLANNER_COMPOSITIONS)}, got {options.composition!r}"
            )

    # --- training ------------------------------------------------------------------------------

    def with_inverse_dynamics(
        self,
        dataset: Dataset,
        *,
        training: TrainingConfig | None = None,
        directory: str | os.PathLike[str] | None = None,
        resume: bool = True,
        progress: bool = True,
    ) -> Self:
        """Learn which action leads from one state to the next, for the actions of plans.

        The second agent executes the actions that lead along its planned states, and shares every
        other weight, the normalisers and the condition scalings with this one, which stays as it
        is. With data of a system that has changed, it compensates for the change.

        Args:
            dataset: As in `fit`. It need not be good, but should go wherever plans go.
            training: Settings; the configuration's `regressor_training` by default.
            directory: Where checkpoints and TensorBoard files go; None keeps nothing.
            resume: Continue from a checkpoint in `directory`.
            progress: Show a progress bar.
        """
        config = replace(self.config, inverse_dynamics=True, sampling=self.options)
        sizes = self.conditions.sizes
        fresh = config.models(self._nx, self._writer.size, sizes)[INVERSE_DYNAMICS]
        made = self._beside(config, {INVERSE_DYNAMICS: fresh})
        job = made._job(INVERSE_DYNAMICS, made._known_data(dataset))
        job = replace(job, config=training or job.config)
        made._take(train_modules([job], directory, self.device, resume=resume, progress=progress))
        return made

    def _known_data(self, dataset: Dataset) -> TrainingData:
        """Data for a model of an agent whose normalisers and scalings are there already."""
        config = self.config
        return TrainingData(
            as_data(dataset),
            config.windows,
            self.normalizers,
            self.conditions,
            config.validation_fraction,
            config.seed,
        )

    def _denoising_task(self, role: str, **fields: Any) -> DenoisingTask:
        """How a denoiser learns; `fields` of `DenoisingTask` differ from its defaults."""
        model = self.models[role]
        assert isinstance(model, TrajectoryDenoiser)
        names = tuple(name for name, _ in model.config.conditions)
        loss, initial_state = self.config.loss_of(role), self.config.initial_state
        return DenoisingTask(self._schedule, loss, names, initial_state, self.device, **fields)
