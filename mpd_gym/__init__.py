"""Diffusion planners for control, as Gymnasium agents.

Importing the package registers its environments; torch, MuJoCo and Stable-Baselines3 are loaded
only when something that needs them is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpd_gym import envs as envs
from mpd_gym._version import __version__

if TYPE_CHECKING:
    from mpd_gym.agents import MPDiffuserAgent, MPDiffuserConfig, load_agent

__all__ = ["MPDiffuserAgent", "MPDiffuserConfig", "__version__", "envs", "load_agent"]


def __getattr__(name: str) -> Any:
    """Load the agents when they are first asked for."""
    if name in ("MPDiffuserAgent", "MPDiffuserConfig", "load_agent"):
        from mpd_gym import agents

        return getattr(agents, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What completion offers."""
    return sorted(__all__)
