"""The temporal U-Net in C, for inference, in float32 or with products in bfloat16.

`write_unet` writes the steps of a U-Net into a plan. `NativeUnet` packs the weights once, and for
each number of series lays out the work space and writes the steps, again once; a call then is one
call of C.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Protocol, cast, final

import torch
from torch import Tensor, nn

from mpd_gym.models.backends.native_plan import Panels, Plan, Program, Series, Step
from mpd_gym.models.temporal_unet import ResidualBlock, Stage, TemporalUnet

__all__ = ["NativeUnet", "Weights", "packed", "pairs_up", "taps", "write_unet"]

# Series that go through the network together: few enough for the caches, many enough to reuse
# weights. Larger batches are cut.
BLOCK_ROWS = 32


class Weights(Protocol):
    """Gives the weights of a convolution, or of one half of the steps of a transposed one."""

    def __call__(self, module: nn.Conv1d | nn.ConvTranspose1d, half: int) -> Panels:
        """Return the panels; `half` is 0 or, of a transposed convolution, 1 for odd steps."""
        ...


@final
class NativeUnet:
    """`TemporalUnet.forward` in C, for float32 series on a CPU.

    Args:
        unet: Weights; copied.
        offsets: Of each normalisation, in the order of the layers: where its channels begin in a
            row of scales and shifts.
        library: From `mpd_gym.models.backends.native`.
        paired: Whether to multiply in bfloat16; see `pairs_up`.
    """

    def __init__(
        self,
        unet: TemporalUnet,
        offsets: Sequence[int],
        library: ctypes.CDLL,
        *,
        paired: bool = False,
    ) -> None:
        self._unet = unet
        self._paired = paired
        self._offsets = tuple(offsets)
        self._library = library
        self._lanes = int(library.mpd_lanes())
        assert library.mpd_step_size() == ctypes.sizeof(Step)
        self._weights = {
            (id(module), half): packed(module, half, self._lanes, paired=paired)
            for module in unet.modules()
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d)
            for half in range(module.stride[0] if module.transposed else 1)
        }
        self._outputs = cast(nn.Conv1d, unet.head[3]).out_channels
        self._programs: dict[tuple[int, int], list[Program]] = {}

    def __call__(self, trajectory: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Map ``[M, L, D]`` to ``[M, L, D']``.

        Args:
            trajectory: float32.
            scale: ``[G, ΣC]``; G divides M, and each M / G consecutive series share one row.
            shift: As `scale`.
        """
        rows, length, _ = trajectory.shape
        trajectory, scale, shift = (part.contiguous() for part in (trajectory, scale, shift))
        output = trajectory.new_empty(rows, length, self._outputs)
        blocks = math.ceil(rows / BLOCK_ROWS)
        for block in range(blocks):
            first, end = (rows * i // blocks for i in (block, block + 1))
            # A program's work space serves one call at a time; two threads take two programs.
            idle = self._programs.setdefault((end - first, length), [])
            program = idle.pop() if idle else self._program(end - first, length)
            share = rows // len(scale)
            tensors = trajectory[first:end], output[first:end], scale, shift
            program.run(self._library, program.steps, *tensors, share=share, first=first)
            idle.append(program)
        return output

    def _program(self, rows: int, length: int) -> Program:
        """Steps and work space for so many series."""
        plan = _InferencePlan(rows, self._lanes, paired=self._paired)

        def weights(module: nn.Conv1d | nn.ConvTranspose1d, half: int) -> Panels:
            return self._weights[id(module), half]

        write_unet(plan, self._unet, weights, self._offsets, length)
        return plan.program()


@final
class _InferencePlan(Plan):
    """Writes over what is not read again."""

    def normalise(
        self, series: Series, norm: nn.Module, film: int, residual: Series | None, swish: bool
    ) -> Series:
        """Normalise series in place."""
        self._normalise(series, series, norm, film, residual, swish)
        self._changed(series)
        return series


def pairs_up(unet: TemporalUnet, library: ctypes.CDLL) -> bool:
    """Whether the compiled code multiplies in bfloat16 on this CPU, and can take the U-Net.

    Pairs of channels must not reach from one series to another that goes into the same product.
    """
    widths = [module.out_channels for module in unet.modules() if isinstance(module, nn.Conv1d)]
    return bool(library.mpd_pairs()) and all(width % 2 == 0 for width in widths[:-1])


def write_unet(
    plan: Plan, unet: TemporalUnet, weights: Weights, offsets: Sequence[int], length: int
) -> None:
    """Write the steps from trajectories to predictions.

    Args:
        plan: Gets the steps.
        unet: Its layers.
        weights: Their weights.
        offsets: Of each normalisation: where its channels begin in a row of scales and shifts.
        length: Steps of a trajectory.
    """
    films = iter(offsets)

    def convolve(module: nn.Module, sources: Sequence[Series]) -> Series:
        convolution, before = _parts(module)
        panels = weights(convolution, 0)
        target = plan.series(sources[0].length, panels.outputs)
        shifts = range(-before, convolution.kernel_size[0] - before)
        plan.product([(source, shift) for shift in shifts for source in sources], panels, target)
        return target

    def block(module: ResidualBlock, sources: Sequence[Series]) -> Series:
        (first, second), (norm, other) = module.convolutions, module.norms
        branch = convolve(first, sources)
        branch = plan.normalise(branch, norm, next(films), None, swish=False)
        branch = convolve(second, [branch])
        plain = isinstance(module.projection, nn.Identity)
        residual = sources[0] if plain else convolve(module.projection, sources)
        return plan.normalise(branch, other, next(films), residual, swish=True)

    def stage(module: nn.Module, sources: Sequence[Series]) -> Series:
        blocks = cast(Stage, module)
        return block(blocks.second, [block(blocks.first, sources)])

    first, _ = _parts(cast(Stage, unet.encoder[0]).first.convolutions[0])
    hidden = plan.series(length, first.in_channels)
    plan.load(hidden)
    skips = []
    for module, down in zip(unet.encoder, unet.downs, strict=True):
        hidden = stage(module, [hidden])
        skips.append(hidden)
        if not isinstance(down, nn.Identity):
            hidden = _halved(plan, weights, down, hidden)
    hidden = stage(unet.middle, [hidden])
    for module, up in zip(unet.decoder, unet.ups, strict=True):
        hidden = _doubled(plan, weights, up, stage(module, [hidden, skips.pop()]))
    if unet.causal:
        plan.add(skips[0], hidden)
    convolution, norm, _, last = unet.head
    hidden = convolve(convolution, [hidden])
    hidden = plan.normalise(hidden, norm, next(films), None, swish=True)
    plan.store(convolve(last, [hidden]))


def packed(
    module: nn.Conv1d | nn.ConvTranspose1d, half: int, lanes: int, *, paired: bool
) -> Panels:
    """Weights of a convolution, or of one half of the steps of a transposed one, as panels."""
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


def _halved(plan: Plan, weights: Weights, module: nn.Module, series: Series) -> Series:
    """Convolution of stride 2, of the even and the odd steps."""
    convolution, before = _parts(module)
    panels = weights(convolution, 0)
    halves = [plan.alternate(series, start) for start in (0, 1)]
    target = plan.series(halves[0].length, panels.outputs)
    steps = range(-before, convolution.kernel_size[0] - before)
    plan.product([(halves[step % 2], step // 2) for step in steps], panels, target)
    return target


def _doubled(plan: Plan, weights: Weights, module: nn.Module, series: Series) -> Series:
    """Transposed convolution of kernel 4 and stride 2: even steps, then odd ones."""
    found = module[0] if isinstance(module, nn.Sequential) else module  # then a cut of the end
    convolution = cast(nn.ConvTranspose1d, found)
    target = plan.series(2 * series.length, convolution.out_channels)
    for start in (0, 1):
        sources = [(series, shift) for shift, _ in _seen(convolution, start)]
        plan.product(sources, weights(convolution, start), target, every=2, start=start)
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
