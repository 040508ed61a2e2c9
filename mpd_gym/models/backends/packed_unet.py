"""The temporal U-Net for inference: `TemporalUnet` on series with time first.

`Films` computes what a reverse pass needs once for each level, `Unet` the rest. The affine part of
a normalisation and its modulation are one scale and one shift, for which weights are multiplied out
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpd_gym.models.backends.packed_ops import Convolution, modulated_norm
from mpd_gym.models.temporal_unet import (
    ResidualBlock,
    Stage,
    TemporalUnet,
    by_channels,
    film_offsets,
)

__all__ = ["Films", "Unet"]

Layer = Callable[[Tensor], Tensor]
Scales = Iterator[tuple[Tensor, Tensor]]  # scale and shift, each [M · C], of layer after layer


@final
class Films:
    """Scales and shifts of all normalisations of a U-Net, the last without modulation.

    Layers of as many channels are one group: one product gives all of its scales and shifts.
    """

    def __init__(self, unet: TemporalUnet, packed: bool) -> None:
        blocks, last = list(_blocks(unet)), cast(nn.GroupNorm, unet.head[1])
        films: list[Any] = [film for block in blocks for film in block.films]
        norms: list[Any] = [norm for block in blocks for norm in block.norms]
        layers = by_channels(norms)
        first = [films[index][0] for group in layers.values() for index in group]
        weight, bias = (torch.cat([getattr(film, name) for film in first]) for name in _NAMES)
        # In float32: conditioning is outside of the loop and may stay exact.
        self._hidden = Convolution(weight[..., None], bias, (0, 0), 1, torch.float32, packed)
        self._outputs: list[tuple[Tensor, Tensor]] = []  # weights [n, d, 2 C], biases [n, 1, 2 C]
        for group in layers.values():
            folded = [_folded(films[index][2], norms[index]) for index in group]
            weights, biases = (torch.stack(part) for part in zip(*folded, strict=True))
            weights = weights.detach().transpose(1, 2).contiguous()
            self._outputs.append((weights, biases.detach()[:, None]))
        self._last = [getattr(last, name).detach().clone() for name in _NAMES]
        self._groups = [*layers.items(), (last.num_channels, [len(norms)])]
        self.offsets = [*film_offsets(norms), sum(norm.num_channels for norm in norms)]

    def __call__(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``[G, d]`` to scales and shifts, each ``[G, ΣC]``, group by group."""
        rows = len(embedding)
        hidden = functional.silu(self._hidden(embedding[None]))[0]
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

    def split(self, values: Tensor, rows: int) -> list[Tensor]:
        """Split ``[G, ΣC]`` into ``[M · C]`` for each normalisation, in the order of the layers.

        Args:
            values: Scales or shifts.
            rows: M; each of the G rows goes to M / G consecutive ones.
        """
        given = len(values)
        sizes = [channels * len(group) for channels, group in self._groups]
        found: dict[int, Tensor] = {}
        parts = torch.split(values, sizes, dim=-1)
        for part, (channels, group) in zip(parts, self._groups, strict=True):
            shared = part.view(given, 1, len(group), channels)
            shared = shared.expand(-1, rows // given, -1, -1).permute(2, 0, 1, 3)
            found |= zip(group, shared.reshape(len(group), -1).unbind(), strict=True)
        return [found[index] for index in range(len(found))]


@final
class Unet:
    """`TemporalUnet.forward` on series ``[L, M, C]``."""

    def __init__(self, unet: TemporalUnet, dtype: torch.dtype, packed: bool) -> None:
        def layer(module: nn.Module, padding: tuple[int, int] | None = None) -> Convolution:
            assert isinstance(module, nn.Conv1d) and module.bias is not None
            half = module.kernel_size[0] // 2
            around, stride = padding or (half, half), module.stride[0]
            return Convolution(module.weight, module.bias, around, stride, dtype, packed)

        def stage(module: nn.Module) -> tuple[_Block, _Block]:
            blocks = cast(Stage, module)
            return _Block(blocks.first, layer), _Block(blocks.second, layer)

        def down(module: nn.Module) -> Layer | None:
            if isinstance(module, nn.Identity):
                return None
            pad, convolution = cast(nn.Sequential, module)
            return layer(convolution, cast(nn.ConstantPad1d, pad).padding)

        self._dtype = dtype
        self._encoder = [stage(module) for module in unet.encoder]
        self._downs = [down(module) for module in unet.downs]
        self._middle = stage(unet.middle)
        self._decoder = [stage(module) for module in unet.decoder]
        self._ups = [_Upsampling(up, dtype, packed) for up in unet.ups]
        self._head = (layer(unet.head[0]), layer(unet.head[3]))
        self._norm = _normalisation(unet.head[1])

    def __call__(self, trajectory: Tensor, scales: Scales) -> Tensor:
        """Map ``[M, L, D]`` to ``[L, M, D']``; `scales` are those of `Films`, split."""
        hidden = trajectory.transpose(0, 1).to(self._dtype).contiguous()
        skips = []
        for blocks, down in zip(self._encoder, self._downs, strict=True):
            hidden = _stage(blocks, hidden, scales)
            skips.append(hidden)
            if down is not None:
                hidden = down(hidden)
        hidden = _stage(self._middle, hidden, scales)
        for blocks, up in zip(self._decoder, self._ups, strict=True):
            hidden = up(_stage(blocks, torch.cat((hidden, skips.pop()), dim=-1), scales))
        first, last = self._head
        return last(functional.silu(self._norm(first(hidden), *next(scales)), inplace=True))


@final
class _Block:
    """Residual block."""

    def __init__(self, block: ResidualBlock, layer: Callable[[nn.Module], Layer]) -> None:
        self._first, self._second = (layer(module) for module in block.convolutions)
        self._norms = [_normalisation(norm) for norm in block.norms]
        plain = isinstance(block.projection, nn.Identity)
        self._projection = None if plain else layer(block.projection)

    def __call__(self, hidden: Tensor, scales: Scales) -> Tensor:
        first, second = self._norms
        branch = first(self._first(hidden), *next(scales))
        branch = second(self._second(branch), *next(scales))
        branch += hidden if self._projection is None else self._projection(hidden)
        return functional.silu(branch, inplace=True)


@final
class _Upsampling:
    """Transposed convolution of kernel 4 and stride 2 as one of kernel 2 with twice the channels.

    Steps i − 1 and i of the input give steps 2 i − 1 and 2 i of the output.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, packed: bool) -> None:
        assert isinstance(module, nn.ConvTranspose1d) and module.bias is not None
        sizes = (module.kernel_size, module.stride, module.padding)
        assert sizes == ((4,), (2,), (1,)), sizes
        weight = module.weight.transpose(0, 1)  # [C, C_in, 4]
        odd, even = weight[..., [2, 0]], weight[..., [3, 1]]
        bias = module.bias.repeat(2)
        self._inner = Convolution(torch.cat((odd, even)), bias, (1, 1), 1, dtype, packed)

    def __call__(self, series: Tensor) -> Tensor:
        pairs = self._inner(series)  # [L + 1, M, 2 C]
        length, rows, channels = pairs.shape
        pairs = pairs.view(length, rows, 2, channels // 2).transpose(1, 2)
        return pairs.reshape(2 * length, rows, -1)[1:-1]


_NAMES = ("weight", "bias")


def _stage(blocks: tuple[_Block, _Block], hidden: Tensor, scales: Scales) -> Tensor:
    return blocks[1](blocks[0](hidden, scales), scales)


def _blocks(unet: TemporalUnet) -> Iterator[ResidualBlock]:
    for module in (*unet.encoder, unet.middle, *unet.decoder):
        stage = cast(Stage, module)
        yield from (stage.first, stage.second)


def _normalisation(norm: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    assert isinstance(norm, nn.GroupNorm)
    groups, eps = norm.num_groups, norm.eps
    return lambda series, scale, shift: modulated_norm(series, scale, shift, groups, eps)


def _folded(film: nn.Linear, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """FiLM layer that gives scale and shift of a normalisation without its affine part.

    scale · (γ z + β) + bias = (γ scale) z + (β scale + bias).
    """
    gain, offset = norm.weight, norm.bias
    found = []
    for name in _NAMES:
        scale, bias = getattr(film, name).chunk(2)
        shape = (-1, *(1 for _ in scale.shape[1:]))
        found.append(torch.cat((gain.view(shape) * scale, offset.view(shape) * scale + bias)))
    return found[0], found[1]
