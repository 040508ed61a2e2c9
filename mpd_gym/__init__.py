"""Diffusion planners for control, as Gymnasium agents.

Importing the package registers its environments; torch, MuJoCo and Stable-Baselines3 are loaded
only when something that needs them is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mpd_gym import envs as envs
from mpd_gym._version import __version__

if TYPE_CHECKING:
    from mpd_gym.agents import load_agent
    from mpd_gym.agents.mpdiffuser import MPDiffuserAgent, MPDiffuserConfig
    from mpd_gym.agents.presets import preset
    from mpd_gym.collect.record import record
    from mpd_gym.datasets import load_episodes
    from mpd_gym.evaluation import compare, evaluate

__all__ = [
    "MPDiffuserAgent",
    "MPDiffuserConfig",
    "__version__",
    "compare",
    "envs",
    "evaluate",
    "load_agent",
    "load_episodes",
    "preset",
    "record",
]

_MODULES = {
    "MPDiffuserAgent": "agents.mpdiffuser",
    "MPDiffuserConfig": "agents.mpdiffuser",
    "compare": "evaluation",
    "evaluate": "evaluation",
    "load_agent": "agents",
    "load_episodes": "datasets",
    "preset": "agents.presets",
    "record": "collect.record",
}


def __getattr__(name: str) -> Any:
    """Load a name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """What completion offers."""
    return sorted(__all__)
