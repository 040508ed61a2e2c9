"""The temporal U-Net as a list of ops; the one place, beside plain PyTorch, that has its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import nn

from mpd_gym.models.backends.ops import OpList, Panels, Series
from mpd_gym.models.temporal_unet import ResidualBlock, Stage, TemporalUnet

__all__ = ["Weights", "pack", "taps", "write_unet"]


class Weights(Protocol):
    """Gives the weights of a convolution, or of one half of the steps of a transposed one."""

    def __call__(self, module: nn.Conv1d | nn.ConvTranspose1d, half: int) -> Panels:
        """Return the panels; `half` is 0 or, of a transposed convolution, 1 for odd steps."""
        ...


def write_unet(
    ops: OpList, unet: TemporalUnet, weights: Weights, offsets: Sequence[int], length: int
) -> None:
    """Write the ops from trajectories to predictions.

    Args:
        ops: Gets them.
        unet: Its layers.
        weights: Their weights.
        offsets: Of each normalisation: where its channels begin in a row of scales and shifts.
        length: Steps of a trajectory.
    """
    films = iter(offsets)

    def convolve(module: nn.Module, sources: Sequence[Series]) -> Series:
        convolution, before = _parts(module)
        panels = weights(convolution, 0)
        target = ops.series(sources[0].length, panels.outputs)
        shifts = range(-before, convolution.kernel_size[0] - before)
        ops.product([(source, shift) for shift in shifts for source in sources], panels, target)
        return target

    def block(module: ResidualBlock, sources: Sequence[Series]) -> Series:
        (first, second), (norm, other) = module.convolutions, module.norms
        branch = convolve(first, sources)
        branch = ops.normalise(branch, norm, next(films), None, swish=False)
        branch = convolve(second, [branch])
        plain = isinstance(module.projection, nn.Identity)
        residual = sources[0] if plain else convolve(module.projection, sources)
        return ops.normalise(branch, other, next(films), residual, swish=True)

    def stage(module: nn.Module, sources: Sequence[Series]) -> Series:
        blocks = cast(Stage, module)
        return block(blocks.second, [block(blocks.first, sources)])

    first, _ = _parts(cast(Stage, unet.encoder[0]).first.convolutions[0])
    hidden = ops.series(length, first.in_channels)
    ops.load(hidden)
    skips = []
    for module, down in zip(unet.encoder, unet.downs, strict=True):
        hidden = stage(module, [hidden])
        skips.append(hidden)
        if not isinstance(down, nn.Identity):
            hidden = _halved(ops, weights, down, hidden)
    hidden = stage(unet.middle, [hidden])
    for module, up in zip(unet.decoder, unet.ups, strict=True):
        hidden = _doubled(ops, weights, up, stage(module, [hidden, skips.pop()]))
    if unet.causal:
        ops.add(skips[0], hidden)
    convolution, norm, _, last = unet.head
    hidden = convolve(convolution, [hidden])
    hidden = ops.normalise(hidden, norm, next(films), None, swish=True)
    ops.store(convolve(last, [hidden]))


def pack(module: nn.Conv1d | nn.ConvTranspose1d, half: int, lanes: int, *, paired: bool) -> Panels:
    """Lay out the weights of a convolution, or of one half of the steps of a transposed one."""
    inputs = (2, 0, 1) if module.transposed else (2, 1, 0)
    weight = module.weight.detach().permute(inputs)[taps(module, half)]  # [k, C_in, C]
    assert module.bias is not None
    outputs = weight.shape[-1]
    missing = -outputs % lanes
    if paired:
        weight = nn.functional.pad(weight, (0, missing, 0, weight.shape[1] % 2))
        pairs = weight.to(torch.bfloat16).view(len(weight), -1, 2, outputs + missing)
        panels = pairs.transpose(2, 3).contiguous().view(torch.float32).flatten(0, 1)[..., 0]
    else:
        panels = nn.functional.pad(weight.flatten(0, 1), (0, missing))
    panels = panels.view(len(panels), -1, lanes).transpose(0, 1).contiguous()
    return Panels(panels, nn.functional.pad(module.bias.detach(), (0, missing)), outputs)


def taps(module: nn.Conv1d | nn.ConvTranspose1d, half: int) -> list[int]:
    """Taps of a convolution in the order of its panels."""
    if isinstance(module, nn.Conv1d):
        return list(range(module.kernel_size[0]))
    return [tap for _, tap in _seen(module, half)]


def _halved(ops: OpList, weights: Weights, module: nn.Module, series: Series) -> Series:
    """Convolution of stride 2, of the even and the odd steps."""
    convolution, before = _parts(module)
    panels = weights(convolution, 0)
    halves = [ops.alternate(series, start) for start in (0, 1)]
    target = ops.series(halves[0].length, panels.outputs)
    steps = range(-before, convolution.kernel_size[0] - before)
    ops.product([(halves[step % 2], step // 2) for step in steps], panels, target)
    return target


def _doubled(ops: OpList, weights: Weights, module: nn.Module, series: Series) -> Series:
    """Transposed convolution of kernel 4 and stride 2: even steps, then odd ones."""
    found = module[0] if isinstance(module, nn.Sequential) else module  # then a cut of the end
    convolution = cast(nn.ConvTranspose1d, found)
    target = ops.series(2 * series.length, convolution.out_channels)
    for start in (0, 1):
        sources = [(series, shift) for shift, _ in _seen(convolution, start)]
        ops.product(sources, weights(convolution, start), target, every=2, start=start)
    return target


def _parts(module: nn.Module) -> tuple[nn.Conv1d, int]:
    """A convolution, and the zeros before its input."""
    if isinstance(module, nn.Conv1d):
        return module, int(module.padding[0])
    pad, convolution = cast(nn.Sequential, module)
    return cast(nn.Conv1d, convolution), cast(nn.ConstantPad1d, pad).padding[0]


def _seen(module: nn.ConvTranspose1d, start: int) -> list[tuple[int, int]]:
    """(Shift, tap) of each input that steps `start`, `start` + 2 … of its output see.

    Input i and tap t add to step 2 i + t − padding.
    """
    assert module.kernel_size == (4,) and module.stride == (2,), module
    places = [(start + int(module.padding[0]) - tap, tap) for tap in range(4)]
    return sorted((place // 2, tap) for place, tap in places if place % 2 == 0)
