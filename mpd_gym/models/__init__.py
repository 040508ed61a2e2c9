"""Networks: temporal U-Net, denoisers of planner and dynamics model, regressors of the ranker."""

from mpd_gym.models.denoisers import DenoiserConfig, TrajectoryDenoiser
from mpd_gym.models.regressors import Regressor, RegressorConfig, regression_loss
from mpd_gym.models.temporal_unet import TemporalUnet, UnetConfig

__all__ = [
    "DenoiserConfig",
    "Regressor",
    "RegressorConfig",
    "TemporalUnet",
    "TrajectoryDenoiser",
    "UnetConfig",
    "regression_loss",
]
