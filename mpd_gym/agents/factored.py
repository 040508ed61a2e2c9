"""Agents whose dynamics model is a network of its own, which can learn on while the rest stays."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TypeVar

from mpd_gym.agents.config import FactoredConfig
from mpd_gym.agents.diffusion_agent import DiffusionAgent
from mpd_gym.agents.fitting import Dataset, train_modules
from mpd_gym.training import TrainingConfig, TrainingResult
from mpd_gym.types import Array

__all__ = ["FactoredAgent"]

C = TypeVar("C", bound=FactoredConfig)


class FactoredAgent(DiffusionAgent[C]):
    """An agent with a dynamics model of its own (Zhou et al. 2025, section 3.4)."""

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

        An agent that executes what its inverse dynamics say needs these anew as well, see
        `with_inverse_dynamics`.

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
        settings = (training or self.config.training).with_steps(steps)
        return self._train_dynamics(
            dataset, "dynamics-finetuned", settings, directory, resume, progress
        )

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
        job = self._job("dynamics", self._known_data(dataset))
        job = replace(job, config=settings, name=name)
        results = train_modules([job], directory, self.device, resume=resume, progress=progress)
        self._take(results)
        return results["dynamics"]

    def _clip_ranges(self) -> list[tuple[Array, Array]]:
        return [self.normalizers.observation.clip_range, self.normalizers.action.clip_range]
