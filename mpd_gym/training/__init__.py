"""The only optimisation loop: `fit` trains one module, `fit_parallel` several at once."""

from __future__ import annotations

from mpd_gym.training.config import TrainingConfig, averaging_rate, learning_rate_factor
from mpd_gym.training.log import History, Record
from mpd_gym.training.loop import TrainingResult, fit
from mpd_gym.training.parallel import fit_parallel
from mpd_gym.training.state import LossFunction, Sampler, to_tensors

__all__ = [
    "History",
    "LossFunction",
    "Record",
    "Sampler",
    "TrainingConfig",
    "TrainingResult",
    "averaging_rate",
    "fit",
    "fit_parallel",
    "learning_rate_factor",
    "to_tensors",
]
