"""The temporal U-Net as two lists of ops, forward and backward.

The first list is that of inference, after ops that pack the weights as they are now; series that
the backward pass reads stay in the work space. The second visits the layers in reverse; the memory
of gradients that have been read is used again.

FiLM, from the embedding on, and the affine part of normalisations are ops as well, whose results
are the scales and shifts that normalisations read.

In bfloat16 the factors of all products are rounded, two channels to a float; those of a gradient of
weights, which are sums over rows, two rows to a float. All else is in float32.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor, nn

from mpd_gym.models.backends.films import conditioned_layers, offsets
from mpd_gym.models.backends.library import Op
from mpd_gym.models.backends.ops import (
    ADD,
    COPY,
    OpList,
    Panels,
    Program,
    Segment,
    Series,
    Sources,
    array,
    rounded,
    segments,
)
from mpd_gym.models.backends.unet_ops import taps
from mpd_gym.models.temporal_unet import TemporalUnet

__all__ = ["TrainingOps"]

Layer = nn.Conv1d | nn.ConvTranspose1d | nn.Linear

# Kinds of ops of a training, in the order of `unet.h`.
PAIR_ROWS, NORM_BACKWARD, WEIGHT_GRADIENT, PACK, UNPACK = range(8, 13)
SWISH, SWISH_BACKWARD, FILM, FILM_BACKWARD = range(13, 17)


@final
class TrainingOps(OpList):
    """Writes the first list of ops, and remembers how to write the second.

    Args:
        rows: As in `OpList`.
        lanes: As in `OpList`.
        weights: All parameters of the U-Net, in the order of their gradients.
        paired: As in `OpList`.
    """

    def __init__(self, rows: int, lanes: int, weights: list[Tensor], *, paired: bool) -> None:
        super().__init__(rows, lanes, paired=paired)
        self._by_rows = paired and rows % 2 == 0
        self._row_pairs: dict[Series, Series] = {}
        self._gradients: dict[Series, Series] = {}
        self._spent: list[Series] = []  # read for the last time by the ops being written
        self._idle: dict[int, list[int]] = {}  # places of so many floats
        self._reverse: list[Callable[[], object]] = []
        self._loaded: Series | None = None
        self._stored: Series | None = None
        self._written: dict[int, set[int]] = {}
        self._packed: dict[int, tuple[Layer, int]] = {}  # what panels are of
        self._embedding = self._scales = self._shifts = Series(0, 0, 0, 0, 0)
        places = [0, *itertools.accumulate(weight.numel() for weight in weights)]
        self.weights_size = places.pop()
        self._places = {id(weight): place for weight, place in zip(weights, places, strict=True)}
        self.places = [
            (tuple(weight.shape), weight.stride(), place)
            for weight, place in zip(weights, places, strict=True)
        ]

    def modulate(self, unet: TemporalUnet) -> list[int]:
        """Write scales and shifts of all normalisations; return where those of each begin."""
        films, norms = (list(part) for part in zip(*conditioned_layers(unet), strict=True))
        head = cast(nn.GroupNorm, unet.head[1])
        begins = offsets(norms)
        width = begins[-1] + head.num_channels
        self._embedding = self.series(1, films[0][0].in_features)
        self._scales, self._shifts = self.series(1, width), self.series(1, width)
        for film, norm, begin in zip(films, norms, begins, strict=False):
            hidden = self._swish(self._linear(self._embedding, film[0]))
            self._film(self._linear(hidden, film[2]), norm, begin)
        self._film(None, head, begins[-1])
        return begins

    def views(self, work: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
        """Embedding; scales and shifts; each followed by its gradients."""

        def view(series: Series) -> Tensor:
            return work.as_strided((self._rows, series.channels), (series.stride, 1), series.start)

        embedding, *others = (
            (view(series), view(self._gradient(series)))
            for series in (self._embedding, self._scales, self._shifts)
        )
        return embedding, tuple(part for pair in zip(*others, strict=True) for part in pair)

    def weights(self, module: Layer, half: int) -> Panels:
        """Panels of a layer, packed at every call."""
        shape = _Shape.of(module, half)
        panels = self._panels(len(shape.taps) * self._depth(shape.inputs), shape.outputs)
        lanes, inner = (shape.outputs, shape.output_stride), (shape.inputs, shape.input_stride)
        self._repack(PACK, panels, module.weight, lanes, inner, shape.taps, self._paired)
        bias = self._panels(1, shape.outputs)
        assert module.bias is not None
        self._repack(PACK, bias, module.bias, (shape.outputs, 1), (1, 0), [0])
        found = Panels(panels, bias, shape.outputs)
        self._packed[id(found)] = module, half
        return found

    def load(self, target: Series) -> None:
        """Read what the caller gives; it gets no gradient."""
        super().load(target)
        self._loaded = target

    def store(self, source: Series) -> None:
        """Write what the caller gets; backward, read its gradient."""
        super().store(source)
        self._stored = source
        self._reverse.append(lambda: OpList.load(self, self._gradient(source)))

    def alternate(self, source: Series, start: int) -> Series:
        """Every second step of series, from step `start` on."""
        target = super().alternate(source, start)
        self._reverse.append(functools.partial(self._alternate_backward, source, target, start))
        return target

    def product(
        self, sources: Sources, weights: Panels, target: Series, every: int = 1, start: int = 0
    ) -> Op:
        """Multiply, as `OpList` does."""
        arguments = sources, weights, target, every, start
        self._reverse.append(functools.partial(self._product_backward, *arguments))
        if self._by_rows:
            for source, _ in sources:
                self._pair_rows(source)  # for the gradient of the weights, while it is at hand
        return super().product(*arguments)

    def normalise(
        self, series: Series, norm: nn.Module, film: int, residual: Series | None, swish: bool
    ) -> Series:
        """Normalise series, and leave them as they are."""
        target = self.series(series.length, series.channels)
        op = self._normalise(series, target, norm, film, residual, swish)
        op.moments = self._room(2 * self._rows * op.groups)
        given = op, series, target, residual
        self._reverse.append(functools.partial(self._normalise_backward, *given))
        return target

    def finish(self) -> tuple[Program, ctypes.Array[Op]]:
        """The first list with the work space, and the second list."""
        forward, self._ops = self._ops, []
        for write in reversed(self._reverse):
            write()
            for series in self._spent:
                self._idle.setdefault(series.length * series.time, []).append(series.start)
            self._spent.clear()
        for op in forward:
            op.scratch = self._size
        backward = self.program()
        memory = Program(array(forward), backward.work, backward.kept)
        return memory, backward.ops

    def _linear(self, source: Series, module: nn.Module) -> Series:
        assert isinstance(module, nn.Linear)
        target = self.series(1, module.out_features)
        self.product([(source, 0)], self.weights(module, 0), target)
        return target

    def _swish(self, source: Series) -> Series:
        target = self.series(1, source.channels)
        op = self._add(SWISH, source, target)
        self._reverse.append(functools.partial(self._swish_backward, op, source, target))
        return target

    def _swish_backward(self, forward: Op, source: Series, target: Series) -> None:
        op = self._again(SWISH_BACKWARD, forward)
        op.d_source, op.d_target = self._gradient(source).start, self._last(target).start

    def _film(self, source: Series | None, norm: nn.GroupNorm, offset: int) -> None:
        """Scales and shifts of a normalisation, from `offset` on."""
        op = self._add(FILM, source or self._scales, self._scales)
        op.source = source.start if source else 0
        op.channels = norm.num_channels
        op.target, op.shifts = self._scales.start + offset, self._shifts.start + offset
        op.weight, op.bias = norm.weight.data_ptr(), norm.bias.data_ptr()
        op.place = self._places[id(norm.weight)]  # the bias is next to it
        self._reverse.append(functools.partial(self._film_backward, op, source, offset))

    def _film_backward(self, forward: Op, source: Series | None, offset: int) -> None:
        op = self._again(FILM_BACKWARD, forward)
        op.d_source = self._gradient(source).start if source else 0
        op.d_target = self._gradient(self._scales).start + offset
        op.d_shifts = self._gradient(self._shifts).start + offset

    def _again(self, kind: int, forward: Op) -> Op:
        """The backward op of a forward one."""
        op = Op.from_buffer_copy(forward)
        op.kind = kind
        self._ops.append(op)
        return op

    def _joins(self, series: Series, half: int | None = None) -> bool:
        """Whether a gradient of series has been written before, to which more is to be added."""
        halves = self._written.setdefault(series.start, set())
        before = set(halves)
        halves |= {0, 1} if half is None else {half}
        return bool(before) if half is None else half in before

    def _gradient(self, series: Series) -> Series:
        """The gradient of series, placed at its first use."""
        if series not in self._gradients:
            size = series.length, series.channels, series.stride, series.time
            self._gradients[series] = self._place(*size)
        return self._gradients[series]

    def _last(self, series: Series) -> Series:
        """The gradient of series, which is read for the last time."""
        if series == self._stored:  # what pads its channels has to stay zero
            return self._gradient(series)
        self._spent.append(self._gradient(series))
        return self._gradients.pop(series)

    def _room(self, size: int) -> int:
        """A place that is not needed any more, or a new one."""
        idle = self._idle.get(size)
        return idle.pop() if idle else super()._room(size)

    def _alternate_backward(self, source: Series, target: Series, start: int) -> None:
        kind = ADD if self._joins(source, start) else COPY
        op = self._add(kind, self._last(target), self._gradient(source))
        op.length = target.length
        op.target += start * source.time
        op.target_time *= 2

    def _normalise_backward(
        self, forward: Op, series: Series, target: Series, residual: Series | None
    ) -> None:
        op = self._again(NORM_BACKWARD, forward)
        op.d_source, op.d_target = self._gradient(series).start, self._last(target).start
        if residual is not None:
            op.d_residual = self._gradient(residual).start
            op.accumulate = self._joins(residual)

    def _product_backward(
        self, sources: Sources, panels: Panels, target: Series, every: int, start: int
    ) -> None:
        module, half = self._packed[id(panels)]
        shape = _Shape.of(module, half)
        # Odd steps of a transposed convolution come before even ones here.
        gradient = self._gradient(target) if start else self._last(target)
        if every > 1:
            gradient = super().alternate(gradient, start)
            self._spent.append(gradient)
        self._weight_gradient(sources, module, half, gradient)
        inputs: dict[Series, list[tuple[int, int]]] = {}  # begin of the weights, and shift
        depth = 0
        for series, shift in sources:
            tap, channel = divmod(depth, shape.inputs)
            begin = shape.taps[tap] + channel * shape.input_stride
            inputs.setdefault(series, []).append((begin, shift))
            depth += series.channels
        for series, pairs in inputs.items():
            if series == self._loaded:
                continue
            turned = self._panels(len(pairs) * self._depth(shape.outputs), series.channels)
            lanes, inner = (
                (series.channels, shape.input_stride),
                (shape.outputs, shape.output_stride),
            )
            begins = [begin for begin, _ in pairs]
            self._repack(PACK, turned, module.weight, lanes, inner, begins, self._paired)
            bias = self._panels(1, series.channels)
            seen = [(gradient, -shift) for _, shift in pairs]
            weights = Panels(turned, bias, series.channels)
            op = super().product(seen, weights, self._gradient(series))
            op.accumulate = self._joins(series)
        for pairs_of in (self._pairs, self._row_pairs):
            if gradient in pairs_of:
                self._spent.append(pairs_of.pop(gradient))

    def _weight_gradient(
        self, sources: Sources, module: Layer, half: int, gradient: Series
    ) -> None:
        shape = _Shape.of(module, half)
        found = self._panels(len(shape.taps) * shape.inputs, shape.outputs)
        if self._by_rows:
            sources = [(self._pair_rows(source), shift) for source, shift in sources]
        parts = array(segments(sources, shape.inputs))
        row_pairs = self._pair_rows(gradient).start if self._by_rows else 0
        op = self._add(WEIGHT_GRADIENT, gradient, gradient)
        op.paired, op.row_pairs = self._by_rows, row_pairs
        op.segments, op.count = ctypes.addressof(parts), len(parts)
        op.panels, op.depth = found.data_ptr(), found.shape[1]
        op.place = self._places[id(module.bias)]
        # Both halves of a transposed convolution have one bias; the second comes first here.
        op.accumulate = isinstance(module, nn.ConvTranspose1d) and half == 0
        self._kept += [found, parts]
        lanes, inner = (shape.outputs, shape.output_stride), (shape.inputs, shape.input_stride)
        self._repack(UNPACK, found, module.weight, lanes, inner, shape.taps)

    def _pair_rows(self, series: Series) -> Series:
        """Series with two rows to a float in bfloat16; rounded once."""
        if series not in self._row_pairs:
            size = series.channels, series.stride, series.time // 2
            pairs = self._row_pairs[series] = self._place(series.length, *size)
            self._add(PAIR_ROWS, series, pairs)
        return self._row_pairs[series]

    def _depth(self, inputs: int) -> int:
        """Floats that so many inputs of a product take."""
        return (inputs + 1) // 2 if self._paired else inputs

    def _panels(self, depth: int, outputs: int) -> Tensor:
        return torch.zeros(rounded(outputs, self._lanes) // self._lanes, depth, self._lanes)

    def _repack(
        self,
        kind: int,
        panels: Tensor,
        parameter: Tensor,
        lanes: tuple[int, int],
        inner: tuple[int, int],
        begins: list[int],
        paired: bool = False,
    ) -> None:
        """Between a parameter and panels; `lanes` and `inner` are counts and strides."""
        parts = array(Segment(start=begin, channels=inner[0]) for begin in begins)
        op = Op(kind=kind, channels=lanes[0], depth=panels.shape[1], count=len(parts))
        op.segments, op.panels = ctypes.addressof(parts), panels.data_ptr()
        op.plain, op.place = parameter.data_ptr(), self._places[id(parameter)]
        op.lane_stride, op.inner_stride, op.paired = lanes[1], inner[1], paired
        self._ops.append(op)
        self._kept += [panels, parts]


@final
@dataclass(frozen=True)
class _Shape:
    """Sizes and strides of a convolution's weights; where each of its taps begins."""

    inputs: int
    outputs: int
    input_stride: int
    output_stride: int
    taps: list[int]

    @staticmethod
    def of(module: Layer, half: int) -> _Shape:
        """Read them from a module."""
        if isinstance(module, nn.Linear):
            outward, inward = module.weight.stride()
            return _Shape(module.in_features, module.out_features, inward, outward, [0])
        strides = module.weight.stride()
        first, second = strides[:2] if module.transposed else strides[1::-1]
        begins = [tap * strides[2] for tap in taps(module, half)]
        return _Shape(module.in_channels, module.out_channels, first, second, begins)
