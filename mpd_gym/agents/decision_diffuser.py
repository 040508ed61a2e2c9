"""Decision Diffuser (Ajay et al. 2023): states by diffusion, actions by inverse dynamics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from mpd_gym.agents.config import INVERSE_DYNAMICS, DiffusionConfig, Layout, planner_sampling
from mpd_gym.agents.diffusion_agent import DiffusionAgent
from mpd_gym.agents.fitting import DenoisingTask
from mpd_gym.agents.losses import states_only
from mpd_gym.agents.options import SamplingConfig
from mpd_gym.agents.planner import planner_denoiser
from mpd_gym.agents.request import Request
from mpd_gym.diffusion import LossConfig, make_schedule
from mpd_gym.errors import ConfigError
from mpd_gym.models import TrajectoryDenoiser
from mpd_gym.types import Array, Step

__all__ = ["DecisionDiffuserAgent", "DecisionDiffuserConfig"]


@final
@dataclass(frozen=True)
class DecisionDiffuserConfig(DiffusionConfig):
    """Configuration of Decision Diffuser. The other fields are those of `DiffusionConfig`.

    Attributes:
        initial_state: ``"inpaint"`` with plans of H − 1 steps, as published, or ``"film"``: in
            closed loop on the car, 62 and 100 % park (``mpd-gym reproduce car-umaze``).
        loss: Options of the denoising loss; the network predicts x̂_0 by default.
        inverse_dynamics: Always learned: plans hold no actions.

    Raises:
        ConfigError: If a value is unknown, out of range or contradicts another.
    """

    initial_state: str = "inpaint"
    loss: LossConfig = field(default_factory=lambda: LossConfig(prediction="x0"))
    inverse_dynamics: bool = True

    def networks(self) -> list[str]:
        """Planner of states, and inverse dynamics."""
        return ["planner", INVERSE_DYNAMICS]

    def network(self, role: str, nx: int, nu: int, sizes: Mapping[str, int]) -> TrajectoryDenoiser:
        """Make the planner's network."""
        return TrajectoryDenoiser(planner_denoiser(self, nx, 0, sizes))

    def layout(self, nx: int, nu: int, sizes: Mapping[str, int]) -> Layout:
        """Shape of what the agent samples."""
        return Layout(self.horizon, nx, self.plan_horizon, self.diffusion_steps)

    def _check(self) -> None:
        if not self.inverse_dynamics:
            raise ConfigError(
                "inverse_dynamics: Decision Diffuser plans states alone and has no other actions; "
                "expected True, got False"
            )
        object.__setattr__(self, "sampling", planner_sampling(self.sampling))
        planner_denoiser(self, 1, 0, self.unit_sizes)
        make_schedule(self.schedule, self.diffusion_steps)


@final
class DecisionDiffuserAgent(DiffusionAgent[DecisionDiffuserConfig]):
    """A planner of states; a MLP on (x_t, x_{t+1}) gives the actions.

    Make one with `fit` or `load`.
    """

    name = "decision_diffuser"
    config_type = DecisionDiffuserConfig

    def _step(self, request: Request, levels: Sequence[int]) -> Step:
        return self._composed(request, levels, self._known(request.initial))

    def _split(self, trajectories: Tensor) -> tuple[Tensor, Tensor]:
        return self._future(trajectories, trajectories[..., self._nx :])

    def _check_options(self, options: SamplingConfig) -> None:
        super()._check_options(options)
        if options.actions == "planned":
            raise ConfigError(
                "actions: Decision Diffuser plans states alone; expected None or "
                "'inverse_dynamics', got 'planned'"
            )

    def _clip_ranges(self) -> list[tuple[Array, Array]]:
        return [self.normalizers.observation.clip_range]

    def _task(self, role: str) -> DenoisingTask:
        return self._denoising_task(role, rearrange=states_only)
