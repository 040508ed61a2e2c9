"""The temporal U-Net as a list of ops; the one place, beside plain PyTorch, that has its layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import nn

from mpd_gym.models.backends.ops import OpList, Panels, Series
from mpd_gym.models.temporal_unet import CumulativeNorm, ResidualBlock, Stage, TemporalUnet

__all__ = [
    "Layer",
    "Weights",
    "embedding_size",
    "modulated_channels",
    "pack",
    "taps",
    "write_films",
    "write_unet",
]


Layer: TypeAlias = nn.Conv1d | nn.ConvTranspose1d | nn.Linear


class Weights(Protocol):
    """Gives the weights of a layer, or of one half of the steps of a transposed convolution."""

    def __call__(self, module: Layer, half: int) -> Panels:
        """Return the panels; `half` is 0 or, of a transposed convolution, 1 for odd steps."""
        ...


def write_films(ops: OpList, unet: TemporalUnet, weights: Weights, embedding: Series) -> Series:
    """Write the ops from an embedding to the scales and shifts of all normalisations.

    Args:
        ops: Gets them.
        unet: Its layers.
        weights: Their weights.
        embedding: ``[1, M, d]``.

    Returns:
        Scales, then shifts, in the order of the layers, ``[1, M, 2 ΣC]``.
    """

    def linear(source: Series, module: nn.Linear) -> Series:
        target = ops.series(1, module.out_features)
        ops.product([(source, 0)], weights(module, 0), target)
        return target

    norms = _norms(unet)
    target = ops.series(1, 2 * modulated_channels(unet))
    blocks = [block for block in unet.modules() if isinstance(block, ResidualBlock)]
    films: list[Any] = [film for block in blocks for film in block.films]
    for film, norm, begin in zip((*films, None), norms, _begins(norms), strict=True):
        hidden = film and linear(ops.swish(linear(embedding, film[0])), film[2])
        ops.film(hidden, norm, target, begin)
    return target


def write_unet(ops: OpList, unet: TemporalUnet, weights: Weights, length: int) -> None:
    """Write the ops from trajectories to predictions.

    Args:
        ops: Gets them.
        unet: Its layers.
        weights: Their weights.
        length: Steps of a trajectory.
    """
    films = _begins(_norms(unet))

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


def pack(module: Layer, half: int, lanes: int, *, paired: bool) -> Panels:
    """Lay out the weights of a layer, or of one half of the steps of a transposed convolution."""
    weight = module.weight.detach()
    if isinstance(module, nn.Linear):
        weight = weight[..., None]
    inputs = (2, 0, 1) if isinstance(module, nn.ConvTranspose1d) else (2, 1, 0)
    weight = weight.permute(inputs)[taps(module, half)]  # [k, C_in, C]
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


def taps(module: Layer, half: int) -> list[int]:
    """Taps of a layer in the order of its panels."""
    if isinstance(module, nn.ConvTranspose1d):
        return [tap for _, tap in _seen(module, half)]
    return list(range(module.kernel_size[0])) if isinstance(module, nn.Conv1d) else [0]


def embedding_size(unet: TemporalUnet) -> int:
    """Size d of the embedding that FiLM reads."""
    return next(film.in_features for film in unet.modules() if isinstance(film, nn.Linear))


def modulated_channels(unet: TemporalUnet) -> int:
    """Channels of all normalisations, ΣC."""
    return sum(norm.num_channels for norm in _norms(unet))


def _norms(unet: TemporalUnet) -> list[Any]:
    """Normalisations in the order of the forward pass, the last of which is not modulated."""
    return [norm for norm in unet.modules() if isinstance(norm, nn.GroupNorm | CumulativeNorm)]


def _begins(norms: Sequence[Any]) -> Iterator[int]:
    """Where the channels of each normalisation begin in a row of scales."""
    begin = 0
    for norm in norms:
        yield begin
        begin += norm.num_channels


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
