"""A small denoiser with conditions, and a noise schedule for it, that several test files share."""

from __future__ import annotations

from typing import Any

import torch

from mpd_gym.diffusion.schedule import make_schedule
from mpd_gym.models import DenoiserConfig, TrajectoryDenoiser, UnetConfig

CONDITIONS = (("return", 1), ("goal", 2))
SCHEDULE = make_schedule("cosine", 10)


def network(**changes: Any) -> TrajectoryDenoiser:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "observation_dim": 2,
        "action_dim": 1,
        "horizon": 4,
        "conditions": CONDITIONS,
        "unet": UnetConfig(8, (1, 2), groups=4),
    }
    return TrajectoryDenoiser(DenoiserConfig(**(config | changes))).double()
