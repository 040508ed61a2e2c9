"""Diffusion over trajectories: schedules, loss, guidance, samplers and compositions.

Denoisers are callables, so this room depends on no network.
"""

from mpd_gym.diffusion.composition import (
    COMPOSITIONS,
    PLANNER_COMPOSITIONS,
    Parts,
    compose,
    inpaint,
    inpaint_denoiser,
)
from mpd_gym.diffusion.guidance import PREDICTIONS, guided
from mpd_gym.diffusion.loss import Examples, LossConfig, assemble, denoising_loss
from mpd_gym.diffusion.safety import (
    VARIANTS,
    Barrier,
    SafetyConfig,
    box_barrier,
    function_barrier,
    projected,
)
from mpd_gym.diffusion.samplers import (
    SAMPLERS,
    make_move,
    noise_to_level,
    normal_noise,
    sample,
    start_noise,
    with_history,
)
from mpd_gym.diffusion.schedule import SCHEDULES, SPACINGS, NoiseSchedule, make_schedule
from mpd_gym.diffusion.value_guidance import ascend

__all__ = [
    "COMPOSITIONS",
    "PLANNER_COMPOSITIONS",
    "PREDICTIONS",
    "SAMPLERS",
    "SCHEDULES",
    "SPACINGS",
    "VARIANTS",
    "Barrier",
    "Examples",
    "LossConfig",
    "NoiseSchedule",
    "Parts",
    "SafetyConfig",
    "ascend",
    "assemble",
    "box_barrier",
    "compose",
    "denoising_loss",
    "function_barrier",
    "guided",
    "inpaint",
    "inpaint_denoiser",
    "make_move",
    "make_schedule",
    "noise_to_level",
    "normal_noise",
    "projected",
    "sample",
    "start_noise",
    "with_history",
]
