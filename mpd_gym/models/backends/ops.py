"""Lists of ops for the C code in `c/`, and the work space that they compute in.

A place is a count of floats from the start of the work space. Series are ``[L, M, C]``: time first,
channels padded to whole vectors.

In bfloat16 products take two numbers at a time: series are rounded before them, and there a float
stands for two channels. Sums, normalisations and residuals are in float32.
"""

from __future__ import annotations

import ctypes
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar, final

import torch
from torch import Tensor, nn

from mpd_gym.models.backends.library import Call, Level, Op
from mpd_gym.models.temporal_unet import CumulativeNorm

__all__ = [
    "OpList",
    "Panels",
    "Program",
    "Segment",
    "Series",
    "Sources",
    "array",
    "rounded",
    "segments",
]

# Channels that are multiplied at a time, so that the nearest cache holds a tile of rows with them.
CHUNK = 512
# Where few rows meet many weights, memory sets the pace: each chunk of weights is fetched while
# the one before it is multiplied, and has to fit into that cache as well.
CHUNK_FETCHED = 256
FETCHED_BYTES = 2**20  # of weights, from which on no cache is expected to hold them
FETCHED_ROWS = 48  # rows up to which they are not used often enough for it not to matter
# Kinds of ops, in the order of `unet.h`.
LOAD, STORE, COPY, ADD, PRODUCT, NORM, NORM_CAUSAL, PAIR_CHANNELS = range(8)
ALIGNMENT = 16  # floats: lines of the cache
# Rows at distances of multiples of these floats would meet in a few lines of the nearest cache.
CROWDED = 256
SCRATCH = 6  # numbers of a normalisation for each series and channel


_Item = TypeVar("_Item", bound=ctypes.Structure)


@final
class Segment(ctypes.Structure):
    """``struct segment``."""

    _fields_ = [
        (name, ctypes.c_int64) for name in ("start", "channels", "stride", "shift", "length")
    ]


@final
class Chunk(ctypes.Structure):
    """``struct chunk``."""

    _fields_ = [(name, ctypes.c_int64) for name in ("first", "count", "depth")]


@final
@dataclass(frozen=True)
class Panels:
    """Weights of a product as it reads them.

    Attributes:
        weight: ``[C / lanes, K, lanes]``; in bfloat16 each float is a pair, of two inputs.
        bias: ``[C / lanes, lanes]``.
        outputs: C.
    """

    weight: Tensor
    bias: Tensor
    outputs: int


@final
@dataclass(frozen=True)
class Series:
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


@final
@dataclass(frozen=True)
class Program:
    """Ops for so many series, and the memory that they use."""

    ops: ctypes.Array[Op]
    work: Tensor
    kept: tuple[object, ...]  # what the ops point to

    def run(
        self,
        level: Level,
        ops: ctypes.Array[Op],
        given: Tensor,
        output: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        *,
        share: int = 1,
        first: int = 0,
        gradients: Sequence[Tensor] = (),
    ) -> None:
        """Run ops; all tensors are float32 and contiguous, those of `scale` row by row.

        Args:
            level: The compiled code.
            ops: Those of this program, or others that use its work space.
            given: ``[M, L, D]``.
            output: ``[M, L, D']``, where ops write there.
            scale: ``[G, ΣC]``.
            shift: As `scale`.
            share: Consecutive series that share a row of `scale`.
            first: Number of the first series; its row is ``first // share``.
            gradients: Of `scale`, `shift` and all weights, where ops write there.
        """
        call = Call(
            ctypes.addressof(ops),
            len(ops),
            self.work.data_ptr(),
            given.data_ptr(),
            None if output is None else output.data_ptr(),
            scale.data_ptr(),
            shift.data_ptr(),
            scale.stride(0),
            share,
            first,
            *((gradient.data_ptr() for gradient in gradients) if gradients else (None,) * 3),
            torch.get_num_threads(),
        )
        level.run(ctypes.addressof(call))


Sources: TypeAlias = Sequence[tuple[Series, int]]  # each at so many steps later


class OpList(ABC):
    """Writes ops, and places the series that they compute.

    Args:
        rows: M.
        lanes: Channels are padded to whole multiples of these.
        paired: Whether products are in bfloat16.
    """

    def __init__(self, rows: int, lanes: int, *, paired: bool) -> None:
        self._rows, self._lanes, self._paired = rows, lanes, paired
        self._pairs: dict[Series, Series] = {}  # of channels, of what has been rounded
        self._size = ALIGNMENT  # no series starts at 0, which stands for none
        self._widest = 0
        self._ops: list[Op] = []
        self._kept: list[object] = []

    def series(self, length: int, channels: int) -> Series:
        """Place new series."""
        stride = rounded(channels, self._lanes)
        if stride % CROWDED == 0:
            stride += ALIGNMENT
        return self._place(length, channels, stride, stride * self._rows)

    def _place(self, length: int, channels: int, stride: int, time: int) -> Series:
        self._widest = max(self._widest, time)
        return Series(self._room(length * time), length, channels, stride, time)

    def _room(self, size: int) -> int:
        """The place of so many floats."""
        start = self._size
        self._size += rounded(size, ALIGNMENT)
        return start

    def load(self, target: Series) -> None:
        """Read what the caller gives."""
        self._add(LOAD, target, target)

    def store(self, source: Series) -> None:
        """Write what the caller gets."""
        self._add(STORE, source, source)

    def alternate(self, source: Series, start: int) -> Series:
        """Every second step of series, from step `start` on."""
        target = self.series((source.length - start + 1) // 2, source.channels)
        op = self._add(COPY, source, target)
        op.source += start * source.time
        op.source_time *= 2
        return target

    def product(
        self, sources: Sources, weights: Panels, target: Series, every: int = 1, start: int = 0
    ) -> Op:
        """Multiply sources, each at so many steps later, side by side with weights.

        Results go to every `every`-th step of `target`, from `start` on.
        """
        if self._paired:
            sources = [(self._channel_pairs(source), shift) for source, shift in sources]
        few = target.length // every * self._rows <= FETCHED_ROWS
        fetched = few and weights.weight.nbytes >= FETCHED_BYTES
        size = CHUNK_FETCHED if fetched else CHUNK
        inputs = array(segments(sources, size))
        chunks = array(_chunks([part.channels for part in inputs], size))
        op = self._add(PRODUCT, target, target)
        op.length //= every
        op.target += start * target.time
        op.target_time *= every
        op.segments, op.chunks = ctypes.addressof(inputs), ctypes.addressof(chunks)
        op.count = len(chunks)
        op.weight, op.bias = weights.weight.data_ptr(), weights.bias.data_ptr()
        op.depth, op.fetched, op.chunk_size = weights.weight.shape[1], fetched, size
        op.paired = self._paired
        self._kept += [inputs, chunks, weights]
        return op

    @abstractmethod
    def normalise(
        self, series: Series, norm: nn.Module, film: int, residual: Series | None, swish: bool
    ) -> Series:
        """Normalise series, add a residual, take the swish; return where the result is."""

    def add(self, source: Series, target: Series) -> None:
        """Add series to others."""
        self._add(ADD, source, target)
        self._changed(target)

    def program(self) -> Program:
        """All ops, with work space of zeros."""
        for op in self._ops:
            op.scratch = self._size
        work = torch.zeros(self._size + SCRATCH * self._widest)
        return Program(array(self._ops), work, tuple(self._kept))

    def _channel_pairs(self, series: Series) -> Series:
        """Series as products take them in bfloat16; rounded once."""
        if series not in self._pairs:
            size = (series.channels + 1) // 2, series.stride // 2, series.time // 2
            pairs = self._pairs[series] = self._place(series.length, *size)
            op = self._add(PAIR_CHANNELS, series, pairs)
            op.channels = series.channels
        return self._pairs[series]

    def _changed(self, series: Series) -> None:
        """Series are written again: what was rounded of them is no longer theirs."""
        self._pairs.pop(series, None)

    def _normalise(
        self,
        series: Series,
        target: Series,
        norm: nn.Module,
        film: int,
        residual: Series | None,
        swish: bool,
    ) -> Op:
        assert isinstance(norm, nn.GroupNorm | CumulativeNorm)
        op = self._add(NORM if isinstance(norm, nn.GroupNorm) else NORM_CAUSAL, series, target)
        op.groups, op.eps, op.film, op.swish = norm.num_groups, norm.eps, film, swish
        op.residual = 0 if residual is None else residual.start
        return op

    def _add(self, kind: int, source: Series, target: Series) -> Op:
        op = Op(kind=kind, length=target.length, rows=self._rows, channels=target.channels)
        op.source, op.source_stride, op.source_time = source.start, source.stride, source.time
        op.target, op.target_stride, op.target_time = target.start, target.stride, target.time
        self._ops.append(op)
        return op


def segments(sources: Sources, most: int) -> Iterator[Segment]:
    """Inputs of a product, none of more than `most` channels."""
    for series, shift in sources:
        for begin in range(0, series.channels, most):
            start = series.start + shift * series.time + begin
            channels = min(most, series.channels - begin)
            yield Segment(start, channels, series.stride, shift, series.length)


def _chunks(channels: Sequence[int], most: int) -> Iterator[Chunk]:
    """Group segments into chunks of no more than `most` channels."""
    first = depth = size = 0
    for index, more in enumerate(channels):
        if size + more > most:
            yield Chunk(first, index - first, depth)
            first, depth, size = index, depth + size, 0
        size += more
    yield Chunk(first, len(channels) - first, depth)


def array(items: Iterable[_Item]) -> ctypes.Array[_Item]:
    """Structures, at least one, side by side in memory."""
    found = list(items)
    return (type(found[0]) * len(found))(*found)


def rounded(size: int, multiple: int) -> int:
    """The next multiple of `multiple`."""
    return math.ceil(size / multiple) * multiple
