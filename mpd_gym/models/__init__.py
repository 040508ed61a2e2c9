"""Networks: temporal U-Net, denoisers, value network, and MLPs of ranker and peers."""

from mpd_gym.models.denoisers import DenoiserConfig, TrajectoryDenoiser
from mpd_gym.models.mlp import MLP, MLPConfig
from mpd_gym.models.regressors import Regressor, RegressorConfig, regression_loss
from mpd_gym.models.temporal_unet import TemporalUnet, UnetConfig
from mpd_gym.models.value import ValueConfig, ValueNetwork

__all__ = [
    "MLP",
    "DenoiserConfig",
    "MLPConfig",
    "Regressor",
    "RegressorConfig",
    "TemporalUnet",
    "TrajectoryDenoiser",
    "UnetConfig",
    "ValueConfig",
    "ValueNetwork",
    "regression_loss",
]
