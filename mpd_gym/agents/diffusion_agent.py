"""What all agents that sample by diffusion have in common: the reverse pass and its parts."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from mpd_gym.agents.config import INVERSE_DYNAMICS, DiffusionConfig
from mpd_gym.agents.fitting import Dataset, as_data, train_models
from mpd_gym.agents.losses import DenoisingTask
from mpd_gym.agents.options import SamplingConfig
from mpd_gym.agents.planning import Request, condition_columns
from mpd_gym.agents.serialization import AgentParts
from mpd_gym.agents.trained import TrainedAgent
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
    start_noise,
    with_history,
)
from mpd_gym.errors import ConfigError
from mpd_gym.models import TrajectoryDenoiser
from mpd_gym.models.backends.choice import InferenceNetworks
from mpd_gym.models.backends.threads import enough_threads, multiplications, threads
from mpd_gym.training import TrainingConfig, TrainingResult
from mpd_gym.types import Denoiser, Step

__all__ = ["DiffusionAgent", "Inpainting"]

C = TypeVar("C", bound=DiffusionConfig)


class Inpainting(NamedTuple):
    """Entries of a trajectory that are given.

    Attributes:
        mask: True where an entry is given, ``[L, D]``.
        values: ``[M, L, D]``, read under the mask only.
    """

    mask: Tensor
    values: Tensor


class DiffusionAgent(TrainedAgent[C]):
    """An agent that samples its candidates by diffusion.

    Args:
        parts: What it is made of.
    """

    def __init__(self, parts: AgentParts[C]) -> None:
        self._schedule = make_schedule(parts.config.schedule, parts.config.diffusion_steps)
        self._networks = InferenceNetworks()  # shared with the agents that `with_options` makes
        super().__init__(parts)
        self._clip = self._clip_range()

    # --- what a method supplies -------------------------------------------------------------

    @abstractmethod
    def _reverse(self, request: Request, levels: Sequence[int], start: Tensor) -> Tensor:
        """Denoise trajectories ``[M, L, D]`` that are at the first of the levels."""

    # --- sampling ------------------------------------------------------------------------------

    def _sample(self, request: Request) -> Tensor:
        options = self.options
        levels = self._schedule.levels(options.num_steps, spacing=options.level_spacing)
        with threads(enough_threads(self._work(len(request.initial) * options.num_samples))):
            if request.warm is None:
                start = start_noise(request.noise, options.temperature)
            else:
                levels = levels[-options.warm_start_steps :]
                warm = request.warm.repeat_interleave(options.num_samples, 0)
                start = noise_to_level(
                    warm, levels[0], self._schedule, request.noise, options.temperature
                )
            return self._reverse(request, levels, start)

    def _work(self, rows: int) -> int:
        """Multiplications of the largest network call."""
        return max(
            multiplications(model, rows if self._guidance(role) in (0.0, 1.0) else 2 * rows)
            for role, model in self.models.items()
            if isinstance(model, TrajectoryDenoiser)
        )

    def _composed(
        self, request: Request, levels: Sequence[int], known: Inpainting | None = None
    ) -> Step:
        """Step of the composition that the options name, with known entries held everywhere."""
        alone = self.options.composition in PLANNER_COMPOSITIONS
        planner = self._denoiser("planner", request, levels, known)
        dynamics = None if alone else self._denoiser("dynamics", request, levels, known)
        step = self._step(planner, dynamics)
        return step if known is None else inpaint(step, *known)

    def _step(self, planner: Denoiser, dynamics: Denoiser | None = None) -> Step:
        """Step of the composition that the options name, of one or two denoisers."""
        options = self.options
        move = make_move(options.sampler, options.eta)
        nx = self.parts.spaces.nx
        return compose(
            options.composition,
            Parts(planner, dynamics, self._schedule, nx, move, options.temperature),
            dynamics_weight=options.dynamics_weight,
            dynamics_levels=options.dynamics_levels,
        )

    def _denoiser(
        self,
        role: str,
        request: Request,
        levels: Sequence[int],
        known: Inpainting | None = None,
        columns: slice = slice(None),
    ) -> Denoiser:
        """A network bound to a request; `columns` of a trajectory are what it predicts first."""
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

    def _known(self, initial: Tensor) -> Inpainting | None:
        """Entries that hold x_0, the first nx columns of `initial`; its others are in all rows."""
        if not self.layout.inpainted:
            return None
        nx, columns = self.parts.spaces.nx, initial.shape[-1]
        mask = torch.zeros(self.layout.shape, dtype=torch.bool, device=self.device)
        mask[0, :nx] = True
        mask[:, nx:columns] = True
        values = torch.zeros(len(initial), *self.layout.shape, device=self.device)
        values[:, :, :columns] = initial[:, None]
        return Inpainting(mask, values.repeat_interleave(self.options.num_samples, 0))

    def _clip_range(self) -> tuple[Tensor, Tensor]:
        """Bounds ``[D]`` that x̂_0 is cut to."""
        scaled = {"goal": self.normalizers.goal, "final_state": self.normalizers.observation}
        ranges = [self.normalizers.observation.clip_range]
        for spec in self.config.conditions if self.config.appends_conditions else ():
            if spec.name in self.config.inputs:
                normalizer, size = scaled.get(spec.kind), self.conditions.sizes[spec.name]
                unbounded = np.full(size, -np.inf), np.full(size, np.inf)
                ranges.append(unbounded if normalizer is None else normalizer.clip_range)
        if self.config.plans_actions:
            ranges.append(self.normalizers.action.clip_range)
        low, high = (
            torch.as_tensor(np.concatenate(bounds), dtype=torch.float32, device=self.device)
            for bounds in zip(*ranges, strict=True)
        )
        return low, high

    def _check_options(self, options: SamplingConfig) -> None:
        if options.actions == INVERSE_DYNAMICS and INVERSE_DYNAMICS not in self.models:
            raise ConfigError(
                f"actions: the agent has learned no {INVERSE_DYNAMICS}; train it with "
                f"{INVERSE_DYNAMICS}=True in its configuration, or take 'planned'"
            )
        if options.actions == "planned" and not self.config.plans_actions:
            raise ConfigError(
                f"actions: {self.name!r} plans states alone; expected None or "
                f"{INVERSE_DYNAMICS!r}, got 'planned'"
            )
        if not self.config.composed and options.composition not in PLANNER_COMPOSITIONS:
            raise ConfigError(
                f"composition: {self.name!r} has no dynamics model that samples beside a planner; "
                f"expected one of {sorted(PLANNER_COMPOSITIONS)}, got {options.composition!r}"
            )

    # --- training ------------------------------------------------------------------------------

    def finetune_dynamics(
        self,
        dataset: Dataset,
        steps: int,
        *,
        training: TrainingConfig | None = None,
        name: str = "dynamics-finetuned",
        directory: str | os.PathLike[str] | None = None,
        resume: bool = True,
        progress: bool = True,
    ) -> TrainingResult:
        """Train the dynamics model further on other data; every other weight keeps its bits.

        An agent that executes what its inverse dynamics say needs these anew as well, see
        `with_inverse_dynamics`. Source: Zhou et al. 2025, section 3.4.

        Args:
            dataset: As in `fit`. Normalisers and condition scalings stay.
            steps: Optimisation steps.
            training: Other settings; the configuration's by default. Its `steps` are not read.
            name: Of this training in `history`, and of its folder.
            directory: Where checkpoints and TensorBoard files go; None keeps nothing.
            resume: Continue from a checkpoint in `directory`.
            progress: Show a progress bar.

        Returns:
            The losses.

        Raises:
            ConfigError: If the agent has no dynamics model.
        """
        if "dynamics" not in self.models:
            raise ConfigError(f"dynamics: {self.name!r} has no dynamics model to train further")
        settings = (training or self.config.training).with_steps(steps)
        job = self._job("dynamics", as_data(dataset, self), settings, name)
        results = train_models([job], directory, resume=resume, progress=progress)
        self._take(results)
        return results["dynamics"]

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
        fresh = config.models(self.parts.sizes)[INVERSE_DYNAMICS]
        made = self._beside(config, {INVERSE_DYNAMICS: fresh})
        job = made._job(INVERSE_DYNAMICS, as_data(dataset, self), training)
        made._take(train_models([job], directory, resume=resume, progress=progress))
        return made

    def _denoising_task(self, role: str, **fields: Any) -> DenoisingTask:
        """How a denoiser learns; `fields` of `DenoisingTask` differ from its defaults."""
        model = self.models[role]
        assert isinstance(model, TrajectoryDenoiser)
        names = tuple(name for name, _ in model.config.conditions)
        loss, initial_state = self.config.loss_of(role), self.config.initial_state
        return DenoisingTask(self._schedule, loss, names, initial_state, self.device, **fields)
