"""Decision Diffuser (Ajay et al. 2023): states by diffusion, actions by inverse dynamics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from mpd_gym.agents.config import DiffusionConfig, Layout, planner_sampling
from mpd_gym.agents.diffusion_agent import DiffusionAgent
from mpd_gym.agents.learning import Task
from mpd_gym.agents.planner import planner_denoiser
from mpd_gym.agents.request import Request
from mpd_gym.agents.tasks import PerceptronTask, states_only
from mpd_gym.diffusion import LossConfig, make_schedule
from mpd_gym.models import Perceptron, PerceptronConfig, TrajectoryDenoiser
from mpd_gym.types import Array, Step

__all__ = ["DecisionDiffuserAgent", "DecisionDiffuserConfig"]


@final
@dataclass(frozen=True)
class DecisionDiffuserConfig(DiffusionConfig):
    """Configuration of Decision Diffuser. The other fields are those of `DiffusionConfig`.

    Attributes:
        loss: Options of the denoising loss; the network predicts x̂_0 by default.
        inverse_hidden: Widths of the inverse dynamics' hidden layers; it is trained as
            `regressor_training` says.

    Raises:
        ConfigError: If a value is unknown, out of range or contradicts another.
    """

    loss: LossConfig = field(default_factory=lambda: LossConfig(prediction="x0"))
    inverse_hidden: tuple[int, ...] = (256, 256)

    @property
    def initial_state(self) -> str:
        """Where x_0 stands."""
        return "inpaint"

    def networks(self) -> list[str]:
        """Planner of states, and inverse dynamics."""
        return ["planner", "inverse_dynamics"]

    def network(self, role: str, nx: int, nu: int, sizes: Mapping[str, int]) -> nn.Module:
        """Make one of them."""
        if role == "planner":
            return TrajectoryDenoiser(planner_denoiser(self, nx, 0, sizes))
        return Perceptron(PerceptronConfig(2 * nx, nu, self.inverse_hidden))

    def layout(self, nx: int, nu: int, sizes: Mapping[str, int]) -> Layout:
        """Shape of what the agent samples."""
        return Layout(self.horizon, nx, self.plan_horizon, self.diffusion_steps)

    def _check(self) -> None:
        object.__setattr__(self, "inverse_hidden", tuple(self.inverse_hidden))
        object.__setattr__(self, "sampling", planner_sampling(self.sampling))
        PerceptronConfig(2, 1, self.inverse_hidden)
        planner_denoiser(self, 1, 0, self.unit_sizes)
        make_schedule(self.schedule, self.diffusion_steps)


@final
class DecisionDiffuserAgent(DiffusionAgent[DecisionDiffuserConfig]):
    """A planner of states with x_0 inpainted; a perceptron on (x_t, x_{t+1}) gives the actions.

    Make one with `fit` or `load`.
    """

    name = "decision_diffuser"
    config_type = DecisionDiffuserConfig
    dynamics_roles = frozenset({"inverse_dynamics"})
    auxiliary_roles = frozenset({"inverse_dynamics"})

    def _step(self, request: Request, levels: Sequence[int]) -> Step:
        return self._composed(request, levels, self._known(request.initial))

    @torch.no_grad()
    def _split(self, trajectories: Tensor) -> tuple[Tensor, Tensor]:
        now, after = trajectories[:, :-1], trajectories[:, 1:]
        actions = self.models["inverse_dynamics"](now.to(self.device), after.to(self.device))
        return after, actions

    def _clip_ranges(self) -> list[tuple[Array, Array]]:
        return [self.normalizers.observation.clip_range]

    def _task(self, role: str) -> Task:
        if role == "planner":
            return self._denoising_task(role, rearrange=states_only)
        return PerceptronTask(role)
