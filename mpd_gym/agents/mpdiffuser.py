"""Model Predictive Diffuser (Balim, Li and Du, arXiv 2512.08280)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import final

from torch import Tensor

from mpd_gym.agents.diffusion_agent import DiffusionAgent
from mpd_gym.agents.learning import Dataset, DenoisingTask, TrainingData, as_data, train_modules
from mpd_gym.agents.mpdiffuser_config import MPDiffuserConfig
from mpd_gym.agents.request import Request
from mpd_gym.errors import ConfigError
from mpd_gym.training import TrainingConfig, TrainingResult
from mpd_gym.types import Array, Step

__all__ = ["MPDiffuserAgent", "MPDiffuserConfig"]


@final
class MPDiffuserAgent(DiffusionAgent[MPDiffuserConfig]):
    """Planner and dynamics model sample candidate plans together; a ranker picks one.

    Make one with `fit` or `load`. See `mpd_gym.agents.base.Agent` for `predict`, `plan`,
    `with_options` and the functions that can be set at run time, and
    `mpd_gym.agents.trained.TrainedAgent` for `fit`, `save`, `load` and the constructor.
    """

    name = "mpdiffuser"
    config_type = MPDiffuserConfig
    dynamics_roles = frozenset({"dynamics"})

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
        return self._train_dynamics(
            dataset, "dynamics-finetuned", settings, directory, resume, progress
        )

    def with_new_dynamics(
        self,
        dataset: Dataset,
        config: MPDiffuserConfig,
        *,
        directory: str | os.PathLike[str] | None = None,
        resume: bool = True,
        progress: bool = True,
    ) -> MPDiffuserAgent:
        """Train another dynamics model beside this agent's planner.

        The second agent shares planner, ranking models, normalisers and condition scalings; this
        one stays as it is.

        Args:
            dataset: As in `fit`; what the new dynamics model learns from.
            config: Of the second agent. It may differ in what concerns the dynamics model, such as
                `dynamics_conditions`.
            directory: Where checkpoints and TensorBoard files go; None keeps nothing.
            resume: Continue from a checkpoint in `directory`.
            progress: Show a progress bar.

        Raises:
            ConfigError: If the configuration asks for another planner.
        """
        sizes = self.conditions.sizes
        planner = self.models["planner"].config
        config = config.resolved(self._nx, self._writer.size, sizes)
        same = config.denoiser("planner", self._nx, self._writer.size, sizes) == planner
        if not same or config.loss.prediction != self.config.loss.prediction:
            raise ConfigError(
                "config: the new dynamics model would stand beside another planner; expected "
                f"fields that give {planner} which predicts {self.config.loss.prediction}"
            )
        fresh = config.models(self._nx, self._writer.size, sizes)["dynamics"]
        made = MPDiffuserAgent(
            config,
            {**self.models, "dynamics": fresh},
            self.observation_space,
            self.action_space,
            self.normalizers,
            self.conditions,
            history=self.history,
            device=self.device,
        )
        made.follow(self)
        made._train_dynamics(dataset, "dynamics", config.training, directory, resume, progress)
        return made

    def _train_dynamics(
        self,
        dataset: Dataset,
        name: str,
        settings: TrainingConfig,
        directory: str | os.PathLike[str] | None,
        resume: bool,
        progress: bool,
    ) -> TrainingResult:
        """Train the dynamics model alone, with the normalisers and scalings that the agent has."""
        config = self.config
        held_out = (config.validation_fraction, config.seed)
        data = TrainingData(
            as_data(dataset), config.windows, self.normalizers, self.conditions, *held_out
        )
        job = replace(self._job("dynamics", data), config=settings, name=name)
        results = train_modules([job], directory, self.device, resume=resume, progress=progress)
        self._take(results)
        return results["dynamics"]

    def _step(self, request: Request, levels: Sequence[int]) -> Step:
        return self._composed(request, levels, self._known(request.initial))

    def _split(self, trajectories: Tensor) -> tuple[Tensor, Tensor]:
        return self._future(trajectories[..., : self._nx], trajectories[..., self._nx :])

    def _clip_ranges(self) -> list[tuple[Array, Array]]:
        return [self.normalizers.observation.clip_range, self.normalizers.action.clip_range]

    def _task(self, role: str) -> DenoisingTask:
        return self._denoising_task(role)
