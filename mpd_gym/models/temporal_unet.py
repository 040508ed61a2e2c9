"""Temporal U-Net with FiLM conditioning (Janner et al. 2022; Balim et al. 2025, appendix B).

The forward pass is split in two. `TemporalUnet.modulations` turns an embedding of everything that
is known before a reverse pass (diffusion level, x_0, conditions) into one scale and one bias for
each normalisation; `TemporalUnet.forward` needs only those and the noisy trajectory. Rows of a
batch that share their conditioning share one row of scales and biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from mpd_gym.errors import ConfigError, check_integer, check_widths

__all__ = ["CumulativeNorm", "Modulation", "ResidualBlock", "Stage", "TemporalUnet", "UnetConfig"]

Modulation = tuple[Tensor, Tensor]  # scale and bias, each [G, C]

NORM_EPS = 1e-6  # as in the authors' library, whose default differs from PyTorch's


@final
@dataclass(frozen=True)
class UnetConfig:
    """Size of a temporal U-Net; the defaults are the paper's.

    Attributes:
        width: Channels of the first level, and size of each conditioning embedding.
        multipliers: Channels of each level as multiples of `width`; the time axis is halved
            between two levels.
        kernel_size: Of the convolutions along time; odd.
        groups: Of each group normalisation; divides `width`.
        causal: Whether a row of the output depends on no later row of the input (paper, appendix
            K). Convolutions and normalisations then see the past only, and the first level is
            added to the decoder's output, as steps between those of the second would not see
            themselves otherwise; the weights are as many.

    Raises:
        ConfigError: If a value is out of range.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 4, 8)
    kernel_size: int = 5
    groups: int = 8
    causal: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        check_integer("width", self.width, 4)
        check_integer("kernel_size", self.kernel_size, 1)
        check_integer("groups", self.groups, 1)
        check_widths("multipliers", self.multipliers)
        if not self.multipliers:
            raise ConfigError("multipliers: expected at least one level; got none")
        if self.width % 2 or self.width % self.groups:
            raise ConfigError(
                f"width: expected an even number that groups ({self.groups}) divides; "
                f"got {self.width}"
            )
        if self.kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size: expected an odd number; got {self.kernel_size}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def downsampling(self) -> int:
        """Factor by which the time axis is shortened at the last level."""
        return int(2 ** (len(self.multipliers) - 1))

    def check_horizon(self, horizon: int) -> None:
        """Check that the time axis can be halved between all levels.

        Raises:
            ConfigError: Naming the horizon and the factor that must divide it.
        """
        factor = self.downsampling
        check_integer("horizon", horizon, 1)
        if horizon % factor:
            nearest = max(factor, round(horizon / factor) * factor)
            raise ConfigError(
                f"horizon must be divisible by {factor} ({len(self.multipliers)} levels); "
                f"got {horizon}; {nearest} would do"
            )


@final
class ResidualBlock(nn.Module):
    """Two convolutions, each with group normalisation and FiLM, and a swish after the sum.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        embedding_dim: Size d of the embedding that FiLM reads.
        config: Kernel size and groups.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dim: int,
        config: UnetConfig,
    ) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            _convolution(channels, out_channels, config) for channels in (in_channels, out_channels)
        )
        self.norms = nn.ModuleList(_norm(out_channels, config) for _ in range(2))
        self.films = nn.ModuleList(_film(embedding_dim, out_channels) for _ in range(2))
        self.projection: nn.Module = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv1d(in_channels, out_channels, 1)
        )

    def modulations(self, embedding: Tensor) -> list[Modulation]:
        """Return the (scale, bias) pairs, each ``[G, C]``, of an embedding ``[G, d]``."""
        return [tuple(film(embedding).chunk(2, dim=-1)) for film in self.films]

    def forward(self, hidden: Tensor, modulations: Sequence[Modulation]) -> Tensor:
        """Map ``[M, C_in, L]`` to ``[M, C_out, L]``."""
        branch = hidden
        for convolution, norm, modulation in zip(
            self.convolutions, self.norms, modulations, strict=True
        ):
            branch = _modulate(norm(convolution(branch)), modulation)
        return nn.functional.silu(branch + self.projection(hidden))


@final
class Stage(nn.Module):
    """Two residual blocks, the first of which changes the number of channels."""

    MODULATIONS = 4  # two per block

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dim: int,
        config: UnetConfig,
    ) -> None:
        super().__init__()
        sizes = (embedding_dim, config)
        self.first = ResidualBlock(in_channels, out_channels, *sizes)
        self.second = ResidualBlock(out_channels, out_channels, *sizes)

    def modulations(self, embedding: Tensor) -> list[Modulation]:
        """Return the (scale, bias) pairs of both blocks."""
        return self.first.modulations(embedding) + self.second.modulations(embedding)

    def forward(self, hidden: Tensor, modulations: Sequence[Modulation]) -> Tensor:
        """Map ``[M, C_in, L]`` to ``[M, C_out, L]``."""
        output: Tensor = self.second(self.first(hidden, modulations[:2]), modulations[2:])
        return output


@final
class TemporalUnet(nn.Module):
    """U-Net over the time axis; the decoder sees the outputs of all encoder levels but the first.

    Args:
        in_channels: Size of a row of the input.
        out_channels: Size of a row of the output.
        embedding_dim: Size d of the embedding that FiLM reads.
        config: Widths, kernel and groups.
    """

    def __init__(
        self, in_channels: int, out_channels: int, embedding_dim: int, config: UnetConfig
    ) -> None:
        super().__init__()
        widths = config.widths
        last = len(widths) - 1
        sizes = (embedding_dim, config)
        rising = zip((in_channels, *widths[:-1]), widths, strict=True)
        falling = tuple(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.encoder = nn.ModuleList(Stage(before, after, *sizes) for before, after in rising)
        self.downs = nn.ModuleList(
            _downsample(channels, config) if level < last else nn.Identity()
            for level, channels in enumerate(widths)
        )
        self.middle = Stage(widths[-1], widths[-1], *sizes)
        self.decoder = nn.ModuleList(Stage(2 * before, after, *sizes) for before, after in falling)
        self.ups = nn.ModuleList(_upsample(after, config) for _, after in falling)
        self.causal = config.causal
        self.head = nn.Sequential(
            _convolution(widths[0], widths[0], config),
            _norm(widths[0], config),
            nn.SiLU(),
            nn.Conv1d(widths[0], out_channels, 1),
        )

    def modulations(self, embedding: Tensor) -> list[Modulation]:
        """Compute everything that depends on the conditioning only.

        Args:
            embedding: ``[G, d]``.

        Returns:
            (scale, bias), each ``[G, C]``, of each normalisation in the order of `forward`.
        """
        stages = (*self.encoder, self.middle, *self.decoder)
        return [modulation for stage in stages for modulation in stage.modulations(embedding)]

    def forward(self, trajectory: Tensor, modulations: Sequence[Modulation]) -> Tensor:
        """Map noisy trajectories to the network's prediction.

        Args:
            trajectory: ``[M, H, in_channels]``.
            modulations: From `modulations`, of G rows; G divides M, and each M / G consecutive
                trajectories share one row.

        Returns:
            ``[M, H, out_channels]``.
        """
        size = Stage.MODULATIONS
        per_stage = (modulations[i : i + size] for i in range(0, len(modulations), size))
        hidden = trajectory.transpose(1, 2)  # [M, C, H]
        skips = []
        for stage, down in zip(self.encoder, self.downs, strict=True):
            skips.append(stage(hidden, next(per_stage)))
            hidden = down(skips[-1])
        hidden = self.middle(hidden, next(per_stage))
        for stage, up in zip(self.decoder, self.ups, strict=True):
            joined = torch.cat((hidden, skips.pop()), dim=1)
            hidden = up(stage(joined, next(per_stage)))
        if self.causal:
            hidden = hidden + skips[0]
        output: Tensor = self.head(hidden)
        return output.transpose(1, 2)


@final
class CumulativeNorm(nn.Module):
    """Group normalisation whose mean and variance are those of the steps so far.

    Args:
        groups: Of the channels.
        channels: Size C.
    """

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__()
        self.num_groups, self.num_channels, self.eps = groups, channels, NORM_EPS
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise ``[M, C, L]``."""
        rows, _, length = hidden.shape
        grouped = hidden.reshape(rows, self.num_groups, -1, length)
        steps = torch.arange(1, length + 1, device=hidden.device)
        mean, square = (
            part.mean(2, keepdim=True).cumsum(-1) / steps for part in (grouped, grouped.square())
        )
        variance = (square - mean.square()).clamp(min=0)
        normed = (grouped - mean) * torch.rsqrt(variance + self.eps)
        output: Tensor = normed.flatten(1, 2) * self.weight[:, None] + self.bias[:, None]
        return output


def _convolution(in_channels: int, out_channels: int, config: UnetConfig) -> nn.Module:
    """Convolution that keeps the length."""
    size = config.kernel_size
    if config.causal:
        return _padded((size - 1, 0), nn.Conv1d(in_channels, out_channels, size))
    return nn.Conv1d(in_channels, out_channels, size, padding=size // 2)


def _downsample(channels: int, config: UnetConfig) -> nn.Sequential:
    """Halve the length; step i of the result sees steps up to 2 i in a causal network."""
    padding = (2, 0) if config.causal else (0, 1)
    return _padded(padding, nn.Conv1d(channels, channels, kernel_size=3, stride=2))


def _upsample(channels: int, config: UnetConfig) -> nn.Module:
    """Double the length; steps from 2 i on see step i in a causal network."""
    if config.causal:
        convolution = nn.ConvTranspose1d(channels, channels, kernel_size=4, stride=2)
        return nn.Sequential(convolution, nn.ConstantPad1d((0, -2), 0.0))
    return nn.ConvTranspose1d(channels, channels, kernel_size=4, stride=2, padding=1)


def _padded(padding: tuple[int, int], convolution: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.ConstantPad1d(padding, 0.0), convolution)


def _norm(channels: int, config: UnetConfig) -> nn.Module:
    if config.causal:
        return CumulativeNorm(config.groups, channels)
    return nn.GroupNorm(config.groups, channels, eps=NORM_EPS)


def _film(embedding_dim: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(embedding_dim, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, 2 * channels)
    )


def _modulate(hidden: Tensor, modulation: Modulation) -> Tensor:
    scale, bias = (entry[:, None, :, None] for entry in modulation)  # [G, 1, C, 1]
    grouped = hidden.reshape(len(scale), -1, *hidden.shape[1:])  # [G, M / G, C, L]
    return (grouped * scale + bias).reshape(hidden.shape)
