"""What FiLM makes of normalisations: one scale and one shift of each normalised channel.

The affine part of a normalisation and its modulation are one scale and one shift, for which the
weights are multiplied out: scale · (γ z + β) + bias = (γ scale) z + (β scale + bias).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpd_gym.models.temporal_unet import ResidualBlock, TemporalUnet

__all__ = ["Films", "conditioned_layers", "offsets"]

_NAMES = ("weight", "bias")


@final
class Films:
    """Scales and shifts of all normalisations of a U-Net, the last of which is not modulated.

    Layers of as many channels are one group: one product gives all of its scales and shifts.

    Args:
        unet: Weights; multiplied out here.

    Attributes:
        offsets: Of each normalisation, in the order of the layers: where its channels begin in a
            row of scales and shifts.
    """

    @torch.no_grad()
    def __init__(self, unet: TemporalUnet) -> None:
        films, norms = (list(part) for part in zip(*conditioned_layers(unet), strict=True))
        groups = _by_channels(norms)
        first = [films[index][0] for group in groups.values() for index in group]
        self._weight, self._bias = (
            torch.cat([getattr(film, name) for film in first]) for name in _NAMES
        )
        self._outputs: list[tuple[Tensor, Tensor]] = []  # weights [n, d, 2 C], biases [n, 1, 2 C]
        for group in groups.values():
            folded = [_folded(films[index][2], norms[index]) for index in group]
            weights, biases = (torch.stack(part) for part in zip(*folded, strict=True))
            self._outputs.append((weights.transpose(1, 2).contiguous(), biases[:, None]))
        last = cast(nn.GroupNorm, unet.head[1])
        self._last = [getattr(last, name).detach().clone() for name in _NAMES]
        self.offsets = offsets(norms)

    @torch.no_grad()
    def __call__(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``[G, d]`` to scales and shifts, each ``[G, ΣC]``, group by group."""
        rows = len(embedding)
        hidden = functional.silu(functional.linear(embedding, self._weight, self._bias))
        sizes = [int(weight[..., 0].numel()) for weight, _ in self._outputs]
        pairs = []
        inputs = torch.split(hidden, sizes, dim=-1)
        for part, (weight, bias) in zip(inputs, self._outputs, strict=True):
            part = part.view(rows, len(weight), -1).transpose(0, 1)
            output = torch.baddbmm(bias, part, weight).transpose(0, 1)  # [G, n, 2 C]
            pairs.append([half.flatten(1) for half in output.chunk(2, dim=-1)])
        pairs.append([part.expand(rows, -1) for part in self._last])
        scales, shifts = (torch.cat(parts, dim=-1) for parts in zip(*pairs, strict=True))
        return scales, shifts


def conditioned_layers(unet: TemporalUnet) -> Iterator[tuple[Any, Any]]:
    """FiLM layers and the normalisations that they modulate, in the order of the forward pass."""
    for block in unet.modules():
        if isinstance(block, ResidualBlock):
            yield from zip(block.films, block.norms, strict=True)


def offsets(norms: Sequence[Any]) -> list[int]:
    """Where the channels of normalisations begin in a row that holds group after group.

    Args:
        norms: Those that are modulated; the channels of the last one come after theirs.
    """
    order = [index for group in _by_channels(norms).values() for index in group]
    begins = [0, *itertools.accumulate(norms[index].num_channels for index in order)]
    found = dict(zip(order, begins[:-1], strict=True))
    return [*(found[index] for index in range(len(norms))), begins[-1]]


def _by_channels(norms: Sequence[Any]) -> dict[int, list[int]]:
    """Numbers of the normalisations by their channels; a group's modulations come together."""
    groups: dict[int, list[int]] = {}
    for index, norm in enumerate(norms):
        groups.setdefault(norm.num_channels, []).append(index)
    return groups


def _folded(film: nn.Linear, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of the FiLM layer that takes the affine part of a normalisation with it."""
    gain, offset = norm.weight, norm.bias
    found = []
    for name in _NAMES:
        scale, bias = getattr(film, name).chunk(2)
        shape = (-1, *(1 for _ in scale.shape[1:]))
        found.append(torch.cat((gain.view(shape) * scale, offset.view(shape) * scale + bias)))
    return found[0], found[1]
