"""Plain denoisers with the factors of convolutions in bfloat16: for GPUs, and CPUs without C."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from mpd_gym.models.denoisers import TrajectoryDenoiser
from mpd_gym.models.temporal_unet import CumulativeNorm, Modulation

__all__ = ["RoundedDenoiser"]


@final
class RoundedDenoiser:
    """A `TrajectoryDenoiser` whose convolutions are in bfloat16, without gradients.

    Normalisations, modulations, residuals and the embedding are in float32. Unlike autocast, it
    rounds the weights once.

    Args:
        network: Weights in float32. Those of the U-Net are copied.
    """

    def __init__(self, network: TrajectoryDenoiser) -> None:
        self._network = network
        self._rounded = copy.deepcopy(network)
        for module in self._rounded.unet.modules():
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
                module.to(torch.bfloat16).register_forward_pre_hook(_round)
            elif isinstance(module, nn.GroupNorm | CumulativeNorm):
                module.register_forward_pre_hook(_widen)

    @torch.no_grad()
    def embed(self, k: Tensor, initial: Tensor, conditions: Tensor, present: Tensor) -> Tensor:
        """Embed everything but the trajectory, as `TrajectoryDenoiser.embed`."""
        return self._network.embed(k, initial, conditions, present)

    @torch.no_grad()
    def modulations(self, embedding: Tensor) -> list[Modulation]:
        """Return (scale, bias) of every normalisation, as `TrajectoryDenoiser.modulations`."""
        return self._network.modulations(embedding)

    @torch.no_grad()
    def denoise(self, trajectory: Tensor, modulations: Sequence[Modulation]) -> Tensor:
        """Predict as `TrajectoryDenoiser.denoise` does."""
        return self._rounded.denoise(trajectory, modulations).to(trajectory.dtype)


def _round(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.to(torch.bfloat16) for value in arguments)


def _widen(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() for value in arguments)
