"""Model Predictive Diffuser (Balim, Li and Du, arXiv 2512.08280)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import final

from torch import Tensor

from mpd_gym.agents.factored import FactoredAgent
from mpd_gym.agents.fitting import Dataset, DenoisingTask
from mpd_gym.agents.mpdiffuser_config import MPDiffuserConfig
from mpd_gym.agents.request import Request
from mpd_gym.errors import ConfigError
from mpd_gym.types import Step

__all__ = ["MPDiffuserAgent", "MPDiffuserConfig"]


@final
class MPDiffuserAgent(FactoredAgent[MPDiffuserConfig]):
    """Planner and dynamics model sample candidate plans together; a ranker picks one.

    Make one with `fit` or `load`. See `mpd_gym.agents.base.Agent` for `predict`, `plan`,
    `with_options` and the functions that can be set at run time,
    `mpd_gym.agents.trained.TrainedAgent` for `fit`, `save`, `load` and the constructor, and
    `mpd_gym.agents.factored.FactoredAgent` for `finetune_dynamics`.
    """

    name = "mpdiffuser"
    config_type = MPDiffuserConfig

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
        settled = {spec.name: spec for spec in self.config.conditions}
        conditions = tuple(
            spec if spec.is_settled else settled.get(spec.name, spec)
            for spec in config.conditions
            if spec.when == "always" or spec.name in settled
        )
        config = replace(config, conditions=conditions)
        config = config.resolved(self._nx, self._writer.size, sizes)
        same = config.denoiser("planner", self._nx, self._writer.size, sizes) == planner
        if not same or config.loss.prediction != self.config.loss.prediction:
            raise ConfigError(
                "config: the new dynamics model would stand beside another planner; expected "
                f"fields that give {planner} which predicts {self.config.loss.prediction}"
            )
        fresh = config.models(self._nx, self._writer.size, sizes)["dynamics"]
        made = self._beside(config, {"dynamics": fresh})
        made._train_dynamics(dataset, "dynamics", config.training, directory, resume, progress)
        return made

    def _step(self, request: Request, levels: Sequence[int]) -> Step:
        return self._composed(request, levels, self._known(request.initial))

    def _split(self, trajectories: Tensor) -> tuple[Tensor, Tensor]:
        return self._future(trajectories[..., : self._nx], trajectories[..., self._nx :])

    def _task(self, role: str) -> DenoisingTask:
        return self._denoising_task(role)
