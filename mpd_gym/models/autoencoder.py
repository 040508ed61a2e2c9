"""Residual convolutional autoencoder of stacked frames, with a model of its latents' dynamics.

The MPDiffuser paper (Balim et al. 2025, section 4.3) plans in the latent space of such a network:
beside the frames it reconstructs, an auxiliary predictor must be able to tell the next latent from
the latent and the action, so that the latents hold what the system's motion depends on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

from mpd_gym.errors import ConfigError, InputError, check_integer, check_widths
from mpd_gym.models.mlp import mlp_layers
from mpd_gym.models.regressors import SMALLEST_STD

__all__ = ["Autoencoder", "AutoencoderConfig", "autoencoder_loss"]

_WHITE = 255.0
_LARGEST_FRAME = 4096
_SMALLEST = 1e-8  # mean square of what an error is compared with; a smaller one counts as this


@final
@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of an autoencoder; survives JSON, as every configuration here.

    Attributes:
        frames: Frames in a stack.
        size: Height and width of a frame, pixels.
        latent_dim: Size of a latent.
        action_dim: nu.
        channels: Of each convolution with stride 2, from the frames inwards; all but the first are
            followed by a residual block.
        dynamics_hidden: Widths of the latent dynamics' hidden layers.

    Raises:
        ConfigError: If a size is out of range, or `size` cannot be halved so often.
    """

    frames: int = 4
    size: int = 64
    latent_dim: int = 32
    action_dim: int = 1
    channels: tuple[int, ...] = (16, 32, 64, 64)
    dynamics_hidden: tuple[int, ...] = (256, 256)

    def __post_init__(self) -> None:
        for name in ("channels", "dynamics_hidden"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            check_widths(name, getattr(self, name))
        check_integer("size", self.size, 1, _LARGEST_FRAME)
        for name, low in (("frames", 1), ("latent_dim", 2), ("action_dim", 1)):
            check_integer(name, getattr(self, name), low)
        if not self.channels or self.size % 2 ** len(self.channels):
            raise ConfigError(
                f"size: expected a multiple of {2 ** len(self.channels)}, as channels="
                f"{self.channels} halves it {len(self.channels)} times (once or more); "
                f"got {self.size}"
            )

    @property
    def latent_bound(self) -> float:
        """No latent has a greater absolute value: its squares sum to `latent_dim` at most."""
        return math.sqrt(self.latent_dim)


@final
class Autoencoder(nn.Module):
    """Encoder, decoder and latent dynamics.

    Latents are normalised to mean 0 and mean square 1 over their own entries (a layer norm without
    weights): their scale cannot shrink to please the dynamics loss, and their space is bounded.

    Args:
        config: Sizes; kept as ``config``.
    """

    action_mean: Tensor
    action_std: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self._side = config.size >> len(config.channels)
        deep = config.channels[-1] * self._side**2
        self.encoder = _encoder_layers(config)
        self.to_latent = nn.Linear(deep, config.latent_dim)
        self.from_latent = nn.Linear(config.latent_dim, deep)
        self.decoder = _decoder_layers(config)
        self.dynamics = mlp_layers(
            (config.latent_dim + config.action_dim, *config.dynamics_hidden, config.latent_dim)
        )
        self.register_buffer("action_mean", torch.zeros(config.action_dim))
        self.register_buffer("action_std", torch.ones(config.action_dim))

    def set_action_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set the scale of actions in the environment's units, ``[nu]`` each; std near 0 becomes 1.

        Raises:
            InputError: If a value is not finite.
        """
        if not torch.isfinite(torch.stack([mean, std])).all():
            raise InputError(f"mean, std: expected finite numbers; got {mean}, {std}")
        self.action_mean.copy_(mean)
        self.action_std.copy_(torch.where(std > SMALLEST_STD, std, torch.ones_like(std)))

    def encode(self, frames: Tensor) -> Tensor:
        """Encode stacks.

        Args:
            frames: ``[M, frames, size, size]``, 0 … 255, uint8 or float, the newest last.

        Returns:
            Latents ``[M, latent_dim]``.

        Raises:
            InputError: If the shape is wrong.
        """
        config = self.config
        wanted = (len(frames), config.frames, config.size, config.size)
        if tuple(frames.shape) != wanted:
            raise InputError(f"frames: expected shape {list(wanted)}; got {list(frames.shape)}")
        features = self.encoder(_shares(frames)).relu().flatten(1)
        return nn.functional.layer_norm(self.to_latent(features).float(), (config.latent_dim,))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents ``[M, latent_dim]`` to stacks ``[M, frames, size, size]``.

        In shares of white; as the decoder is linear at its end, a little under 0 and over 1, too.
        """
        shape = (-1, self.config.channels[-1], self._side, self._side)
        frames: Tensor = self.decoder(self.from_latent(latents).view(shape))
        return frames

    def predict(self, latents: Tensor, actions: Tensor) -> Tensor:
        """Predict the next latents.

        Args:
            latents: ``[M, latent_dim]``.
            actions: In the environment's units, ``[M, nu]``.

        Returns:
            ``[M, latent_dim]``.
        """
        scaled = (actions - self.action_mean) / self.action_std
        change: Tensor = self.dynamics(torch.cat((latents, scaled), dim=-1))
        return latents + change


def autoencoder_loss(
    model: Autoencoder, frames: Tensor, actions: Tensor, dynamics_weight: float
) -> Mapping[str, Tensor]:
    """Reconstruction loss plus latent-dynamics loss of M pairs of successive stacks.

    The first is the share of the pixels' variance that is left unexplained, the second the share
    of the latents' motion: the squared error of the predicted next latents over the squared
    distance from the latents before. 1 is what standing still would score. As a ratio, the second
    can be lowered neither by shrinking latents nor by making them slow.

    Args:
        model: Trained by it: encoder, decoder and latent dynamics together.
        frames: The frames of both stacks, ``[M, frames + 1, size, size]``, 0 … 255.
        actions: Between the two, ``[M, nu]``.
        dynamics_weight: Weight of the second loss.

    Returns:
        ``"loss"``, ``"reconstruction"`` and ``"dynamics"``, scalars.
    """
    now, after = frames[:, :-1], frames[:, 1:]
    latents = model.encode(torch.cat((now, after)))
    latent, next_latent = latents.chunk(2)
    images = _shares(now)
    reconstruction = _ratio(model.decode(latent).float() - images, images - images.mean(0))
    dynamics = _ratio(model.predict(latent, actions).float() - next_latent, next_latent - latent)
    return {
        "loss": reconstruction + dynamics_weight * dynamics,
        "reconstruction": reconstruction,
        "dynamics": dynamics,
    }


@final
class _ResidualBlock(nn.Module):
    """Input plus two convolutions of it, each after a rectifier (He et al. 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.second(self.first(x.relu()).relu())
        return x + change


def _encoder_layers(config: AutoencoderConfig) -> nn.Sequential:
    first, *_ = config.channels
    layers: list[nn.Module] = [nn.Conv2d(config.frames, first, 4, 2, 1)]
    for before, after in pairwise(config.channels):
        layers += [nn.ReLU(), nn.Conv2d(before, after, 4, 2, 1), _ResidualBlock(after)]
    return nn.Sequential(*layers)


def _decoder_layers(config: AutoencoderConfig) -> nn.Sequential:
    first, *_ = config.channels
    layers: list[nn.Module] = []
    for before, after in pairwise(reversed(config.channels)):
        layers += [_ResidualBlock(before), nn.ReLU(), nn.ConvTranspose2d(before, after, 4, 2, 1)]
    layers += [nn.ReLU(), nn.ConvTranspose2d(first, config.frames, 4, 2, 1)]
    return nn.Sequential(*layers)


def _shares(frames: Tensor) -> Tensor:
    """Frames as shares of white."""
    return frames.float() / _WHITE


def _ratio(error: Tensor, scale: Tensor) -> Tensor:
    """Mean square over mean square."""
    return error.square().mean() / scale.square().mean().clamp(min=_SMALLEST)
