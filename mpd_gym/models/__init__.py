"""Networks: temporal U-Net, denoisers, value network, and perceptrons of ranker and peers."""

from mpd_gym.models.denoisers import DenoiserConfig, TrajectoryDenoiser
from mpd_gym.models.perceptron import Perceptron, PerceptronConfig
from mpd_gym.models.regressors import Regressor, RegressorConfig, regression_loss
from mpd_gym.models.temporal_unet import TemporalUnet, UnetConfig
from mpd_gym.models.value import ValueConfig, ValueNetwork

__all__ = [
    "DenoiserConfig",
    "Perceptron",
    "PerceptronConfig",
    "Regressor",
    "RegressorConfig",
    "TemporalUnet",
    "TrajectoryDenoiser",
    "UnetConfig",
    "ValueConfig",
    "ValueNetwork",
    "regression_loss",
]
