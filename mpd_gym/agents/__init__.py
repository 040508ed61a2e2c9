"""Agents: diffusion planners that act through Stable-Baselines3's `predict`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpd_gym.agents.mpdiffuser import MPDiffuserAgent, MPDiffuserConfig
    from mpd_gym.agents.options import SamplingConfig

__all__ = ["AGENTS", "MPDiffuserAgent", "MPDiffuserConfig", "SamplingConfig"]

AGENTS = {"mpdiffuser": "mpd_gym.agents.mpdiffuser:MPDiffuserAgent"}
"""Name of each agent, as it stands in its files, and where its class is."""

_LAZY = {
    "MPDiffuserAgent": "mpd_gym.agents.mpdiffuser",
    "MPDiffuserConfig": "mpd_gym.agents.mpdiffuser_config",
    "SamplingConfig": "mpd_gym.agents.options",
}


def __getattr__(name: str) -> Any:
    """Load an agent when it is first asked for, and torch with it."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
