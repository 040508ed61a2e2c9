"""Configuration of MPDiffuser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from mpd_gym.agents.config import REGRESSORS, FactoredConfig
from mpd_gym.models import TrajectoryDenoiser

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
        initial_state: ``"film"``, or ``"inpaint"`` with plans of H − 1 steps (appendix D).

    Raises:
        ConfigError: If a value is unknown, out of range or contradicts another.
    """

    output = "trajectory"

    initial_state: str = "film"

    def networks(self) -> list[str]:
        """Planner and dynamics model."""
        return ["planner", "dynamics"]

    def network(self, role: str, nx: int, nu: int, sizes: Mapping[str, int]) -> TrajectoryDenoiser:
        """Make the network of a role; see `denoiser`."""
        return TrajectoryDenoiser(self.denoiser(role, nx, nu, sizes))
