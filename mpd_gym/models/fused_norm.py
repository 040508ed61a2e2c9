"""Normalisation with modulation of series ``[L, M, C]``, forward and backward, for training.

``y = x̂ · scale + shift``, where x̂ is a series normalised over groups of channels, and over all
steps (`torch.nn.GroupNorm`) or over the steps so far (`CumulativeNorm`). Scale and shift do not
change with time.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from mpd_gym.models.temporal_unet import CumulativeNorm

__all__ = ["Norm", "normalise", "normalise_backward"]

Norm = nn.GroupNorm | CumulativeNorm


def normalise(
    norm: Norm, values: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Normalise and modulate.

    Args:
        norm: Says how; its own weight and bias are part of `scale` and `shift`.
        values: ``[L, M, C]``, float32.
        scale: ``[M, C]`` or ``[1, C]``.
        shift: Likewise.

    Returns:
        The result, and what `normalise_backward` takes as `kept`.
    """
    if isinstance(norm, CumulativeNorm):
        return _cumulative(norm, values, scale, shift)
    length, rows, channels = values.shape
    factor, term = (part.expand(rows, -1).reshape(-1) for part in (scale, shift))
    shape = (1, rows * channels, length, rows * norm.num_groups)
    output, *moments = torch.native_group_norm(_row(values), factor, term, *shape, norm.eps)
    return output[0, :, :, 0].t().view(values.shape), (values, factor, *moments)


def normalise_backward(
    norm: Norm, gradient: Tensor, kept: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the values ``[L, M, C]``, and of scale and shift, ``[M, C]`` each.

    Args:
        norm: As in `normalise`.
        gradient: Of its result.
        kept: What it returned beside the result.
    """
    if isinstance(norm, CumulativeNorm):
        return _cumulative_backward(norm, gradient, *kept)
    values, factor, *moments = kept
    length, rows, channels = values.shape
    shape = (1, rows * channels, length, rows * norm.num_groups)
    images = _row(gradient.contiguous()), _row(values)
    d_values, d_scale, d_shift = torch.ops.aten.native_group_norm_backward(
        *images, *moments, factor, *shape, (True, True, True)
    )
    series: Tensor = d_values[0, :, :, 0].t().view(values.shape)
    return series, d_scale.view(rows, channels), d_shift.view(rows, channels)


def _cumulative(
    norm: CumulativeNorm, values: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`normalise` by the steps so far; sums over groups and their inverse are products."""
    members = _members(norm.num_groups, norm.num_channels)
    mean, square = (
        _so_far(_product(part, members)).mul_(norm.num_groups / norm.num_channels)
        for part in (values, values.square())
    )
    variance = (square - mean.square()).clamp_(min=0)
    factor = torch.rsqrt(variance + norm.eps)
    spread, start = (_product(part, members.t()) for part in (factor, -mean * factor))
    normed = torch.addcmul(start, values, spread)
    return torch.addcmul(shift, normed, scale), (values, normed, spread, mean, variance, scale)


def _cumulative_backward(
    norm: CumulativeNorm,
    gradient: Tensor,
    values: Tensor,
    normed: Tensor,
    spread: Tensor,
    mean: Tensor,
    variance: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    members = _members(norm.num_groups, norm.num_channels)
    product, inner = gradient * normed, gradient * scale
    factor = torch.rsqrt(variance + norm.eps)
    d_variance = -0.5 * factor.square() * _product(product * scale, members) * (variance > 0)
    d_mean = -factor * _product(inner, members) - 2 * mean * d_variance
    share = norm.num_groups / norm.num_channels
    d_sum, d_squares = (
        _product(_from_here(part).mul_(share), members.t()) for part in (d_mean, d_variance)
    )
    d_values = d_sum.addcmul_(inner, spread).addcmul_(values, d_squares, value=2)
    return d_values, product.sum(0), gradient.sum(0)


def _product(series: Tensor, matrix: Tensor) -> Tensor:
    """``[L, M, A]`` times ``[A, B]``, contiguous."""
    return torch.mm(series.flatten(0, 1), matrix).view(*series.shape[:2], -1)


def _so_far(values: Tensor) -> Tensor:
    """Mean over the steps up to each, of ``[L, …]``."""
    return values.cumsum(0).div_(_counts(len(values)))


def _from_here(gradient: Tensor) -> Tensor:
    """Transpose of `_so_far`."""
    return (gradient / _counts(len(gradient))).flip(0).cumsum(0).flip(0)


@functools.cache
def _counts(length: int) -> Tensor:
    return torch.arange(1.0, length + 1).view(-1, 1, 1)


@functools.cache
def _members(groups: int, channels: int) -> Tensor:
    """Which channels are in which group, ``[C, G]`` of zeros and ones."""
    return torch.eye(groups).repeat_interleave(channels // groups, 0)


def _row(series: Tensor) -> Tensor:
    """View ``[L, M, C]`` as an image ``[1, M · C, L, 1]``, channels last in memory."""
    return series.view(1, len(series), 1, -1).permute(0, 3, 1, 2)
