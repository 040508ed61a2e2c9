"""Configuration of MPDiffuser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from mpd_gym.agents.config import REGRESSORS, FactoredConfig, Layout
from mpd_gym.diffusion import make_schedule
from mpd_gym.models import DenoiserConfig, TrajectoryDenoiser

__all__ = ["REGRESSORS", "MPDiffuserConfig"]


@final
@dataclass(frozen=True)
class MPDiffuserConfig(FactoredConfig):
    """Everything that defines a trained MPDiffuser, and how it samples by default.

    The defaults are the paper's (appendix B) but for the normaliser, the padding and the null
    condition; `mpd_gym.agents.presets` has laptop-size ones for each environment. Round-trips
    through ``dataclasses.asdict`` and JSON. The other fields are those of `FactoredConfig` and
    `DiffusionConfig`.

    Attributes:
        dynamics_conditions: Whether the dynamics model sees the conditions (appendix J).
        initial_state: ``"film"``, or ``"inpaint"`` with plans of H − 1 steps (appendix D).

    Raises:
        ConfigError: If a value is unknown, out of range or contradicts another.
    """

    dynamics_conditions: bool = True
    initial_state: str = "film"

    def networks(self) -> list[str]:
        """Planner and dynamics model."""
        return ["planner", "dynamics"]

    def network(self, role: str, nx: int, nu: int, sizes: Mapping[str, int]) -> TrajectoryDenoiser:
        """Make the network of a role; see `denoiser`."""
        return TrajectoryDenoiser(self.denoiser(role, nx, nu, sizes))

    def denoiser(self, role: str, nx: int, nu: int, sizes: Mapping[str, int]) -> DenoiserConfig:
        """Configuration of the network ``"planner"`` or ``"dynamics"``.

        Args:
            role: Which one.
            nx: Size of an observation.
            nu: Size of an action.
            sizes: Length of each condition.
        """
        planner = role == "planner"
        seen = planner or self.dynamics_conditions
        return DenoiserConfig(
            observation_dim=nx,
            action_dim=nu,
            horizon=self.horizon,
            output="trajectory" if planner else "observations",
            conditions=self.condition_sizes(sizes) if seen else (),
            null=self.null,  # type: ignore[arg-type]
            initial_state=self.initial_state,  # type: ignore[arg-type]
            unet=self.unet if planner else self.dynamics_unet or self.unet,
        )

    def layout(self, nx: int, nu: int, sizes: Mapping[str, int]) -> Layout:
        """Shape of what the agent samples."""
        return Layout(self.horizon, nx + nu, self.plan_horizon, self.diffusion_steps)

    def _check(self) -> None:
        super()._check()
        for role in self.networks():
            self.denoiser(role, 1, 1, self.unit_sizes)
        make_schedule(self.schedule, self.diffusion_steps)
