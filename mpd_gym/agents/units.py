"""Normalisers as differentiable functions, for a caller's functions of states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mpd_gym.datasets import AffineNormalizer, CdfNormalizer, Normalizer
from mpd_gym.types import Array

__all__ = ["environment_units"]


def environment_units(normalizer: Normalizer, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return `Normalizer.unnormalize` for tensors ``[..., d]``, differentiable.

    Beyond the range of the data a CDF, which ends there, goes on as its last piece does, so that
    noisy values keep a gradient.
    """
    if isinstance(normalizer, AffineNormalizer):
        scale, shift = (_tensor(part, device) for part in (normalizer.scale, normalizer.shift))
        return lambda states: states * scale + shift
    assert isinstance(normalizer, CdfNormalizer)
    counts = normalizer.counts.tolist()
    values = torch.split(_tensor(normalizer.values, device), counts)
    levels = torch.split(_tensor(normalizer.levels, device), counts)
    tables = list(zip(values, levels, strict=True))

    def units(states: Tensor) -> Tensor:
        columns = [_interpolated(states[..., j], *table) for j, table in enumerate(tables)]
        return torch.stack(columns, dim=-1)

    return units


def _interpolated(z: Tensor, values: Tensor, levels: Tensor) -> Tensor:
    if len(values) == 1:  # a constant
        return values[0] + 0 * z
    right = torch.searchsorted(levels, z.detach().contiguous()).clamp(1, len(levels) - 1)
    slope = (values[right] - values[right - 1]) / (levels[right] - levels[right - 1])
    return values[right - 1] + slope * (z - levels[right - 1])


def _tensor(array: Array, device: torch.device) -> Tensor:
    return torch.tensor(array, dtype=torch.float32, device=device)
