"""Diffusion over trajectories: schedules, loss, guidance, samplers and compositions.

Denoisers are callables, so that nothing here depends on a network.
"""

from mpd_gym.diffusion.composition import COMPOSITIONS, Parts, compose, inpaint, inpaint_denoiser
from mpd_gym.diffusion.guidance import guided
from mpd_gym.diffusion.loss import Examples, LossConfig, assemble, denoising_loss
from mpd_gym.diffusion.samplers import (
    SAMPLERS,
    make_move,
    noise_to_level,
    normal_noise,
    sample,
    start_noise,
)
from mpd_gym.diffusion.schedule import SCHEDULES, NoiseSchedule, make_schedule

__all__ = [
    "COMPOSITIONS",
    "SAMPLERS",
    "SCHEDULES",
    "Examples",
    "LossConfig",
    "NoiseSchedule",
    "Parts",
    "assemble",
    "compose",
    "denoising_loss",
    "guided",
    "inpaint",
    "inpaint_denoiser",
    "make_move",
    "make_schedule",
    "noise_to_level",
    "normal_noise",
    "sample",
    "start_noise",
]
