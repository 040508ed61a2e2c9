"""Diffusion planners for control, as Gymnasium agents.

Importing the package registers its environments; torch, MuJoCo and Stable-Baselines3 are loaded
only when something that needs them is first used.
"""

from __future__ import annotations

from mpd_gym import envs as envs
from mpd_gym._version import __version__

__all__ = ["__version__", "envs"]
