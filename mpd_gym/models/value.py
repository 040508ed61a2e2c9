"""The value of a noisy trajectory, whose gradient guides Diffuser (Janner et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from mpd_gym.errors import check_integer
from mpd_gym.models.denoisers import embedding_layers, sinusoid
from mpd_gym.models.temporal_unet import Stage, UnetConfig

__all__ = ["ValueConfig", "ValueNetwork"]


@final
@dataclass(frozen=True)
class ValueConfig:
    """A value network: the encoder of a U-Net and a MLP on what it makes of a trajectory.

    Attributes:
        trajectory_dim: D, size of a row.
        horizon: L, rows.
        unet: Sizes of the encoder.

    Raises:
        ConfigError: If a size is out of range, or `horizon` cannot be halved as often as the
            encoder needs.
    """

    trajectory_dim: int
    horizon: int
    unet: UnetConfig = field(default_factory=UnetConfig)

    def __post_init__(self) -> None:
        check_integer("trajectory_dim", self.trajectory_dim, 1)
        self.unet.check_horizon(self.horizon)


@final
class ValueNetwork(nn.Module):
    """Predicts the value of a trajectory from its noisy version at any diffusion level.

    Args:
        config: Sizes; kept as ``config``.
    """

    def __init__(self, config: ValueConfig) -> None:
        super().__init__()
        self.config = config
        unet = config.unet
        self.time_embedding = embedding_layers(unet.width, unet.width)
        stages, downs = [], []
        for before, after in zip((config.trajectory_dim, *unet.widths), unet.widths, strict=False):
            stages.append(Stage(before, after, unet.width, unet))
            downs.append(nn.Conv1d(after, after, kernel_size=3, stride=2, padding=1))
        self.encoder = nn.ModuleList(stages)
        self.downs = nn.ModuleList(downs[:-1])
        flat = unet.widths[-1] * (config.horizon // unet.downsampling)
        self.head = nn.Sequential(
            nn.Linear(flat + unet.width, flat // 2), nn.SiLU(), nn.Linear(flat // 2, 1)
        )

    def forward(self, trajectory: Tensor, k: Tensor) -> Tensor:
        """Predict values ``[M]``.

        Args:
            trajectory: τ^k, ``[M, L, D]``.
            k: Levels 1 … K, ``[M]``, or ``[1]`` for one that all share.
        """
        features = sinusoid(k - 1, self.config.unet.width).to(trajectory.dtype)
        embedding = self.time_embedding(features)
        hidden = trajectory.transpose(1, 2)  # [M, C, L]
        for index, stage in enumerate(self.encoder):
            assert isinstance(stage, Stage)
            hidden = stage(hidden, stage.modulations(embedding))
            if index < len(self.downs):
                hidden = self.downs[index](hidden)
        joined = torch.cat((hidden.flatten(1), embedding.expand(len(trajectory), -1)), dim=-1)
        output: Tensor = self.head(joined)
        return output.squeeze(-1)
