"""From recorded data to training batches.

`load_episodes` reads and validates episodes. `fit_normalizers` and `fit_conditions` read them once
each and keep a few constants, which agents save. `WindowSampler` turns episodes into batches. This
room does not need torch.
"""

from __future__ import annotations

from mpd_gym.datasets.check import DataReport, check_data
from mpd_gym.datasets.conditions import (
    ConditionFunction,
    ConditionScaling,
    FittedConditions,
    discounted_sums,
    fit_conditions,
)
from mpd_gym.datasets.config import ConditionSpec, WindowConfig
from mpd_gym.datasets.episodes import EpisodeSource, FlatFormat, load_episodes, recover_env
from mpd_gym.datasets.fitting import NormalizerFitter, fit_normalizer
from mpd_gym.datasets.normalizers import (
    AffineNormalizer,
    CdfNormalizer,
    Normalizer,
    Normalizers,
    normalizer_from_arrays,
)
from mpd_gym.datasets.sequences import WindowSampler, fit_normalizers
from mpd_gym.datasets.source import cost_at_most
from mpd_gym.datasets.traversal import flat_observations, goal_observations, split_episodes

__all__ = [
    "AffineNormalizer",
    "CdfNormalizer",
    "ConditionFunction",
    "ConditionScaling",
    "ConditionSpec",
    "DataReport",
    "EpisodeSource",
    "FittedConditions",
    "FlatFormat",
    "Normalizer",
    "NormalizerFitter",
    "Normalizers",
    "WindowConfig",
    "WindowSampler",
    "check_data",
    "cost_at_most",
    "discounted_sums",
    "fit_conditions",
    "fit_normalizer",
    "fit_normalizers",
    "flat_observations",
    "goal_observations",
    "load_episodes",
    "normalizer_from_arrays",
    "recover_env",
    "split_episodes",
]
