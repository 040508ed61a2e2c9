"""The temporal U-Net as a list of steps for the C code of `native_unet.c`.

`NativeUnet` packs the weights once. For each number of series it lays out the work space and
writes the steps, again once; a call then is one call of C.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast, final

import torch
from torch import Tensor, nn

from mpd_gym.models.temporal_unet import CumulativeNorm, ResidualBlock, Stage, TemporalUnet

__all__ = ["NativeUnet"]

# Series that go through the network together: few enough for the caches, many enough to reuse
# weights. Larger batches are cut.
BLOCK_ROWS = 32
# Channels that are multiplied at a time, so that the nearest cache holds a tile of rows with them.
CHUNK = 512
# Where few rows meet many weights, memory sets the pace: each chunk of weights is fetched while
# the one before it is multiplied, and has to fit into that cache as well.
CHUNK_FETCHED = 256
FETCHED_BYTES = 2**20  # of weights, from which on no cache is expected to hold them
FETCHED_ROWS = 48  # rows up to which they are not used often enough for it not to matter
LOAD, STORE, COPY, ADD, PRODUCT, NORM, NORM_CAUSAL = range(7)
ALIGNMENT = 16  # floats: lines of the cache


_Item = TypeVar("_Item", bound=ctypes.Structure)


class _Segment(ctypes.Structure):
    """``struct segment``."""

    _fields_ = [(name, ctypes.c_int64) for name in ("start", "channels", "stride")]


class _Chunk(ctypes.Structure):
    """``struct chunk``."""

    _fields_ = [(name, ctypes.c_int64) for name in ("first", "count", "depth")]


class _Step(ctypes.Structure):
    """``struct step``."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "kind",
                "length",
                "rows",
                "channels",
                "source",
                "target",
                "source_stride",
                "target_stride",
                "source_time",
                "target_time",
                "count",
            )
        ),
        ("segments", ctypes.c_void_p),
        ("chunks", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in (
                "depth",
                "fetched",
                "chunk_size",
                "groups",
                "film",
                "residual",
                "swish",
                "scratch",
            )
        ),
        ("eps", ctypes.c_double),
    ]


@dataclass(frozen=True)
class _Weights:
    """Of a product: ``[C / lanes, K, lanes]`` and ``[C / lanes, lanes]``, and C."""

    weight: Tensor
    bias: Tensor
    outputs: int


@final
class NativeUnet:
    """`TemporalUnet.forward` in C, for float32 on a CPU.

    Args:
        unet: Weights; copied.
        offsets: Of each normalisation, in the order of the layers: where its channels begin in a
            row of scales and shifts.
        library: From `mpd_gym.models.native`.
    """

    def __init__(self, unet: TemporalUnet, offsets: Sequence[int], library: ctypes.CDLL) -> None:
        self._unet = unet
        self._offsets = tuple(offsets)
        self._library = library
        self._lanes = int(library.mpd_lanes())
        assert library.mpd_step_size() == ctypes.sizeof(_Step)
        self._weights = {id(module): self._packed(module) for module in _products(unet)}
        self._outputs = cast(nn.Conv1d, unet.head[3]).out_channels
        convolution, before = _parts(unet.head[0])
        self._around = max(before, convolution.kernel_size[0] - 1 - before, 1)
        self._programs: dict[tuple[int, int], list[_Program]] = {}

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
            self._library.mpd_run(
                program.steps,
                len(program.steps),
                program.work.data_ptr(),
                trajectory[first:].data_ptr(),
                output[first:].data_ptr(),
                scale.data_ptr(),
                shift.data_ptr(),
                scale.shape[1],
                rows // len(scale),
                first,
                torch.get_num_threads(),
            )
            idle.append(program)
        return output

    def _program(self, rows: int, length: int) -> _Program:
        """Steps and work space for so many series."""
        plan = _Plan(rows, self._lanes, self._around)
        offsets = iter(self._offsets)
        unet, weights = self._unet, self._weights
        first, _ = _parts(cast(Stage, unet.encoder[0]).first.convolutions[0])
        hidden = plan.series(length, first.in_channels)
        plan.load(hidden)

        def convolve(module: nn.Module, sources: Sequence[_Series]) -> _Series:
            convolution, before = _parts(module)
            (taps,) = weights[id(convolution)]
            target = plan.series(sources[0].length, taps.outputs)
            shifts = range(-before, convolution.kernel_size[0] - before)
            plan.product([(source, shift) for shift in shifts for source in sources], taps, target)
            return target

        def block(module: ResidualBlock, sources: Sequence[_Series]) -> _Series:
            series = list(sources)
            for convolution, norm in zip(module.convolutions, module.norms, strict=True):
                last = norm is module.norms[-1]
                series = [convolve(convolution, series)]
                residual = None
                if last:
                    plain = isinstance(module.projection, nn.Identity)
                    residual = sources[0] if plain else convolve(module.projection, sources)
                plan.normalise(series[0], norm, next(offsets), residual, swish=last)
            return series[0]

        def stage(module: nn.Module, sources: Sequence[_Series]) -> _Series:
            blocks = cast(Stage, module)
            return block(blocks.second, [block(blocks.first, sources)])

        skips = []
        for module, down in zip(unet.encoder, unet.downs, strict=True):
            hidden = stage(module, [hidden])
            skips.append(hidden)
            if not isinstance(down, nn.Identity):
                hidden = self._halved(plan, down, hidden)
        hidden = stage(unet.middle, [hidden])
        for module, up in zip(unet.decoder, unet.ups, strict=True):
            hidden = self._doubled(plan, up, stage(module, [hidden, skips.pop()]))
        if unet.causal:
            plan.add(skips[0], hidden)
        convolution, norm, _, last = unet.head
        hidden = convolve(convolution, [hidden])
        plan.normalise(hidden, norm, next(offsets), None, swish=True)
        plan.store(convolve(last, [hidden]))
        return plan.program()

    def _halved(self, plan: _Plan, module: nn.Module, series: _Series) -> _Series:
        """Convolution of stride 2, of the even and the odd steps."""
        convolution, before = _parts(module)
        (taps,) = self._weights[id(convolution)]
        halves = [plan.alternate(series, start) for start in (0, 1)]
        target = plan.series(halves[0].length, taps.outputs)
        steps = range(-before, convolution.kernel_size[0] - before)
        plan.product([(halves[step % 2], step // 2) for step in steps], taps, target)
        return target

    def _doubled(self, plan: _Plan, module: nn.Module, series: _Series) -> _Series:
        """Transposed convolution of kernel 4 and stride 2: even steps, then odd ones."""
        convolution = _transposed(module)
        parts = self._weights[id(convolution)]
        target = plan.series(2 * series.length, parts[0].outputs)
        for start, taps in enumerate(parts):
            sources = [(series, shift) for shift, _ in _seen(convolution, start)]
            plan.product(sources, taps, target, every=2, start=start)
        return target

    def _packed(self, module: nn.Conv1d | nn.ConvTranspose1d) -> tuple[_Weights, ...]:
        """Weights of a convolution; of a transposed one those of even and of odd steps."""
        assert module.bias is not None
        if isinstance(module, nn.Conv1d):
            parts = [module.weight.permute(2, 1, 0)]  # [k, C_in, C]
        else:
            weight = module.weight.permute(2, 0, 1)
            parts = [weight[[tap for _, tap in _seen(module, start)]] for start in (0, 1)]
        return tuple(self._panels(part.flatten(0, 1), module.bias) for part in parts)

    def _panels(self, weight: Tensor, bias: Tensor) -> _Weights:
        depth, outputs = weight.shape
        panels = math.ceil(outputs / self._lanes)
        missing = panels * self._lanes - outputs
        padded = nn.functional.pad(weight.detach(), (0, missing))
        panelled = padded.view(depth, panels, self._lanes).transpose(0, 1).contiguous()
        return _Weights(panelled, nn.functional.pad(bias.detach(), (0, missing)), outputs)


@dataclass(frozen=True)
class _Series:
    """Series ``[L, M, C]`` in the work space.

    Attributes:
        start: Place of step 0.
        length: L.
        channels: C.
        stride: From one row to the next.
        time: From one step of time to the next.
    """

    start: int
    length: int
    channels: int
    stride: int
    time: int


@dataclass(frozen=True)
class _Program:
    """Steps for so many series, and the memory that they use."""

    steps: ctypes.Array[_Step]
    work: Tensor
    kept: tuple[object, ...]  # what the steps point to


@final
class _Plan:
    """Writes a program.

    Args:
        rows: M.
        lanes: Channels are padded to whole multiples of these.
        around: Steps of zeros before and after each series.
    """

    def __init__(self, rows: int, lanes: int, around: int) -> None:
        self._rows, self._lanes, self._around = rows, lanes, around
        self._size = 0
        self._widest = 0
        self._steps: list[_Step] = []
        self._kept: list[object] = []

    def series(self, length: int, channels: int) -> _Series:
        """Place new series."""
        stride = _rounded(channels, self._lanes)
        time = stride * self._rows
        start = self._size + self._around * time
        self._size = _rounded(start + (length + self._around) * time, ALIGNMENT)
        self._widest = max(self._widest, time)
        return _Series(start, length, channels, stride, time)

    def load(self, target: _Series) -> None:
        """Read what the caller gives."""
        self._add(LOAD, target, target)

    def store(self, source: _Series) -> None:
        """Write what the caller gets."""
        self._add(STORE, source, source)

    def alternate(self, source: _Series, start: int) -> _Series:
        """Every second step of series, from step `start` on."""
        target = self.series((source.length - start + 1) // 2, source.channels)
        step = self._add(COPY, source, target)
        step.source += start * source.time
        step.source_time *= 2
        return target

    def product(
        self,
        sources: Sequence[tuple[_Series, int]],
        weights: _Weights,
        target: _Series,
        every: int = 1,
        start: int = 0,
    ) -> None:
        """Multiply sources, each at so many steps later, side by side with weights.

        Results go to every `every`-th step of `target`, from `start` on.
        """
        few = target.length // every * self._rows <= FETCHED_ROWS
        fetched = few and weights.weight.nbytes >= FETCHED_BYTES
        size = CHUNK_FETCHED if fetched else CHUNK
        segments = _array(
            _Segment(s.start + shift * s.time + begin, min(size, s.channels - begin), s.stride)
            for s, shift in sources
            for begin in range(0, s.channels, size)
        )
        chunks = _array(_chunks([segment.channels for segment in segments], size))
        step = self._add(PRODUCT, target, target)
        step.length //= every
        step.target += start * target.time
        step.target_time *= every
        step.segments, step.chunks = ctypes.addressof(segments), ctypes.addressof(chunks)
        step.count = len(chunks)
        step.weight, step.bias = weights.weight.data_ptr(), weights.bias.data_ptr()
        step.depth, step.fetched, step.chunk_size = weights.weight.shape[1], fetched, size
        self._kept += [segments, chunks, weights]

    def normalise(
        self, series: _Series, norm: nn.Module, film: int, residual: _Series | None, swish: bool
    ) -> None:
        """Normalise series in place; add a residual; take the swish."""
        assert isinstance(norm, nn.GroupNorm | CumulativeNorm)
        step = self._add(NORM if isinstance(norm, nn.GroupNorm) else NORM_CAUSAL, series, series)
        step.groups, step.eps, step.film, step.swish = norm.num_groups, norm.eps, film, swish
        step.residual = 0 if residual is None else residual.start  # no series starts there

    def add(self, source: _Series, target: _Series) -> None:
        """Add series to others."""
        self._add(ADD, source, target)

    def program(self) -> _Program:
        """All steps, with work space of zeros."""
        for step in self._steps:
            step.scratch = self._size
        work = torch.zeros(self._size + 4 * self._widest)
        return _Program(_array(self._steps), work, tuple(self._kept))

    def _add(self, kind: int, source: _Series, target: _Series) -> _Step:
        step = _Step(kind=kind, length=target.length, rows=self._rows, channels=target.channels)
        step.source, step.source_stride, step.source_time = source.start, source.stride, source.time
        step.target, step.target_stride, step.target_time = target.start, target.stride, target.time
        self._steps.append(step)
        return step


def _parts(module: nn.Module) -> tuple[nn.Conv1d, int]:
    """A convolution, and the zeros before its input."""
    if isinstance(module, nn.Conv1d):
        return module, int(module.padding[0])
    pad, convolution = cast(nn.Sequential, module)
    return cast(nn.Conv1d, convolution), cast(nn.ConstantPad1d, pad).padding[0]


def _transposed(module: nn.Module) -> nn.ConvTranspose1d:
    """A transposed convolution; a causal one is followed by a cut of the end."""
    found = module[0] if isinstance(module, nn.Sequential) else module
    return cast(nn.ConvTranspose1d, found)


def _seen(module: nn.ConvTranspose1d, start: int) -> list[tuple[int, int]]:
    """(Shift, tap) of each input that steps `start`, `start` + 2 … of its output see.

    Input i and tap t add to step 2 i + t − padding.
    """
    assert module.kernel_size == (4,) and module.stride == (2,), module
    places = [(start + int(module.padding[0]) - tap, tap) for tap in range(4)]
    return sorted((place // 2, tap) for place, tap in places if place % 2 == 0)


def _products(unet: TemporalUnet) -> list[nn.Conv1d | nn.ConvTranspose1d]:
    return [part for part in unet.modules() if isinstance(part, nn.Conv1d | nn.ConvTranspose1d)]


def _chunks(channels: Sequence[int], most: int) -> Iterator[_Chunk]:
    """Group segments into chunks of no more than `most` channels."""
    first = depth = size = 0
    for index, more in enumerate(channels):
        if size + more > most:
            yield _Chunk(first, index - first, depth)
            first, depth, size = index, depth + size, 0
        size += more
    yield _Chunk(first, len(channels) - first, depth)


def _array(items: Iterable[_Item]) -> ctypes.Array[_Item]:
    found = list(items)
    return (type(found[0]) * len(found))(*found)


def _rounded(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple
