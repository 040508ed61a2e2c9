"""The temporal U-Net in C, forward and backward, for training.

A program has two lists of steps. The first is that of inference, after steps that pack the weights
as they are now; series that the backward pass reads stay in the work space. The second visits the
layers in reverse; the memory of gradients that have been read is used again.

FiLM, from the embedding on, and the affine part of normalisations are steps as well, whose results
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
from typing import Any, cast, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mpd_gym.models.backends.native import library
from mpd_gym.models.backends.native_plan import (
    ADD,
    COPY,
    FILM,
    FILM_BACKWARD,
    NORM_BACKWARD,
    PACK,
    PAIR_ROWS,
    SWISH,
    SWISH_BACKWARD,
    UNPACK,
    WEIGHT_GRADIENT,
    Panels,
    Plan,
    Program,
    Segment,
    Series,
    Sources,
    Step,
    array,
    rounded,
    segments,
)
from mpd_gym.models.backends.native_unet import pairs_up, taps, write_unet
from mpd_gym.models.temporal_unet import ResidualBlock, TemporalUnet, film_offsets

__all__ = ["native_forward", "trains_natively"]

Convolution = nn.Conv1d | nn.ConvTranspose1d
Layer = Convolution | nn.Linear

MOST_SHAPES = 4  # of batches whose work space is kept; it is some 30 MB for 64 laptop-size series


def trains_natively(unet: TemporalUnet, trajectory: Tensor, dtype: torch.dtype) -> bool:
    """Whether `native_forward` can take the place of a U-Net's layers for such trajectories.

    Args:
        unet: The layers.
        trajectory: What they get.
        dtype: In which they multiply.
    """
    plain = trajectory.dtype == torch.float32 and not trajectory.requires_grad
    compiled = library()
    if not plain or unet.causal or compiled is None:
        return False
    paired = dtype == torch.bfloat16 and pairs_up(unet, compiled)
    return paired or dtype == torch.float32


def native_forward(
    unet: TemporalUnet, trajectory: Tensor, embedding: Tensor, *, paired: bool = False
) -> Tensor:
    """`TemporalUnet.forward` with gradients of its parameters and of `embedding`.

    Args:
        unet: Layers; their parameters are read at every call.
        trajectory: ``[M, L, D]``, float32; gets no gradient.
        embedding: What FiLM reads, ``[M, d]``, float32.
        paired: Whether to multiply in bfloat16.

    Returns:
        ``[M, L, D']``.
    """
    trajectory = trajectory.contiguous()
    programs = _PROGRAMS.setdefault(unet, {}).setdefault(paired, _Programs(paired))
    if torch.is_grad_enabled():
        tensors = trajectory, embedding, *unet.parameters()
        output: Tensor = _Unet.apply(unet, programs, *tensors)  # type: ignore[no-untyped-call]
        return output
    program = programs.take(unet, *trajectory.shape[:2])
    output = program.forward(trajectory, embedding)
    programs.give_back(program)
    return output


@final
class _Unet(torch.autograd.Function):
    """One node of the graph for all layers."""

    @staticmethod
    def forward(
        ctx: Any,
        unet: TemporalUnet,
        programs: _Programs,
        trajectory: Tensor,
        embedding: Tensor,
        *_: Tensor,
    ) -> Tensor:
        """Run the first list of steps."""
        ctx.program, ctx.programs = programs.take(unet, *trajectory.shape[:2]), programs
        output: Tensor = ctx.program.forward(trajectory, embedding)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Run the second list of steps, once."""
        program, ctx.program = ctx.program, None
        if program is None:
            raise RuntimeError("backward: a second time, which this graph has no memory for")
        d_embedding, weights = program.gradients(gradient.contiguous())
        ctx.programs.give_back(program)
        return None, None, None, d_embedding, *weights


@final
@dataclass(frozen=True)
class _Training:
    """Both lists of steps for so many series.

    Attributes:
        memory: The first list, and the work space of both.
        backward: The second list.
        embedding: ``[M, d]`` of the work space, and its gradient.
        modulations: Scales and shifts in the work space, ``[M, ΣC]``, and their gradients.
        places: Shape, strides and place of each weight's gradient among all of them.
        weights_size: Numbers in all gradients of weights.
        outputs: D'.
        key: M and L.
        pointers: Where the weights are in memory.
    """

    memory: Program
    backward: ctypes.Array[Step]
    embedding: tuple[Tensor, Tensor]
    modulations: tuple[Tensor, ...]
    places: list[tuple[tuple[int, ...], tuple[int, ...], int]]
    weights_size: int
    outputs: int
    key: tuple[int, int]
    pointers: list[int]

    def forward(self, trajectory: Tensor, embedding: Tensor) -> Tensor:
        """Run the first list."""
        output = trajectory.new_empty(*trajectory.shape[:2], self.outputs)
        self.embedding[0].copy_(embedding)
        self.memory.run(_library(), self.memory.steps, trajectory, output, *self.modulations[:2])
        return output

    def gradients(self, gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the second list; return the gradients of embedding and parameters."""
        found = torch.empty(self.weights_size)
        scale, shift, *others = self.modulations
        written = *others, found
        self.memory.run(_library(), self.backward, gradient, None, scale, shift, gradients=written)
        weights = [found.as_strided(*place) for place in self.places]
        return self.embedding[1].clone(), weights


@final
class _Programs:
    """Idle programs of a U-Net whose weights stay where they are in memory.

    Args:
        paired: Whether they multiply in bfloat16.
    """

    def __init__(self, paired: bool) -> None:
        self._paired = paired
        self._pointers: list[int] = []
        self._idle: dict[tuple[int, int], list[_Training]] = {}

    def take(self, unet: TemporalUnet, rows: int, length: int) -> _Training:
        """An idle program, or a new one."""
        pointers = [weight.data_ptr() for weight in unet.parameters()]
        if pointers != self._pointers:
            self._pointers, self._idle = pointers, {}
        while len(self._idle) > MOST_SHAPES:
            self._idle.pop(next(iter(self._idle)))
        idle = self._idle.setdefault((rows, length), [])
        return idle.pop() if idle else _training(unet, rows, length, pointers, self._paired)

    def give_back(self, program: _Training) -> None:
        """Keep a program for the next call, if the weights are where they were."""
        if program.pointers == self._pointers:
            self._idle.setdefault(program.key, []).append(program)


_PROGRAMS: WeakKeyDictionary[TemporalUnet, dict[bool, _Programs]] = WeakKeyDictionary()


def _training(
    unet: TemporalUnet, rows: int, length: int, pointers: list[int], paired: bool
) -> _Training:
    """Write both lists of steps."""
    assert not unet.causal  # its normalisations have no backward pass here
    lanes = int(_library().mpd_lanes())
    plan = _TrainingPlan(rows, lanes, list(unet.parameters()), paired=paired)
    offsets = plan.modulate(unet)
    write_unet(plan, unet, plan.weights, offsets, length)
    memory, backward = plan.finish()
    views = plan.views(memory.work)
    outputs = cast(nn.Conv1d, unet.head[3]).out_channels
    places, size = plan.places, plan.weights_size
    return _Training(memory, backward, *views, places, size, outputs, (rows, length), pointers)


@final
class _TrainingPlan(Plan):
    """Writes the first list of steps, and remembers how to write the second.

    Args:
        rows: As in `Plan`.
        lanes: As in `Plan`.
        weights: All parameters of the U-Net, in the order of their gradients.
        paired: As in `Plan`.
    """

    def __init__(self, rows: int, lanes: int, weights: list[Tensor], *, paired: bool) -> None:
        super().__init__(rows, lanes, paired=paired)
        self._by_rows = paired and rows % 2 == 0
        self._row_pairs: dict[Series, Series] = {}
        self._gradients: dict[Series, Series] = {}
        self._spent: list[Series] = []  # read for the last time by the steps being written
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
        blocks = [module for module in unet.modules() if isinstance(module, ResidualBlock)]
        norms = [cast(nn.GroupNorm, norm) for block in blocks for norm in block.norms]
        films = [cast(nn.Sequential, film) for block in blocks for film in block.films]
        head = cast(nn.GroupNorm, unet.head[1])
        offsets = [*film_offsets(norms), sum(norm.num_channels for norm in norms)]
        width = offsets[-1] + head.num_channels
        self._embedding = self.series(1, cast(nn.Linear, films[0][0]).in_features)
        self._scales, self._shifts = self.series(1, width), self.series(1, width)
        for film, norm, offset in zip(films, norms, offsets, strict=False):
            hidden = self._swish(self._linear(self._embedding, film[0]))
            self._film(self._linear(hidden, film[2]), norm, offset)
        self._film(None, head, offsets[-1])
        return offsets

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
        self._reverse.append(lambda: Plan.load(self, self._gradient(source)))

    def alternate(self, source: Series, start: int) -> Series:
        """Every second step of series, from step `start` on."""
        target = super().alternate(source, start)
        self._reverse.append(functools.partial(self._alternate_backward, source, target, start))
        return target

    def product(
        self, sources: Sources, weights: Panels, target: Series, every: int = 1, start: int = 0
    ) -> Step:
        """Multiply, as `Plan` does."""
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
        step = self._normalise(series, target, norm, film, residual, swish)
        step.moments = self._room(2 * self._rows * step.groups)
        given = step, series, target, residual
        self._reverse.append(functools.partial(self._normalise_backward, *given))
        return target

    def finish(self) -> tuple[Program, ctypes.Array[Step]]:
        """The first list with the work space, and the second list."""
        forward, self._steps = self._steps, []
        for write in reversed(self._reverse):
            write()
            for series in self._spent:
                self._idle.setdefault(series.length * series.time, []).append(series.start)
            self._spent.clear()
        for step in forward:
            step.scratch = self._size
        backward = self.program()
        memory = Program(array(forward), backward.work, backward.kept)
        return memory, backward.steps

    def _linear(self, source: Series, module: nn.Module) -> Series:
        assert isinstance(module, nn.Linear)
        target = self.series(1, module.out_features)
        self.product([(source, 0)], self.weights(module, 0), target)
        return target

    def _swish(self, source: Series) -> Series:
        target = self.series(1, source.channels)
        step = self._add(SWISH, source, target)
        self._reverse.append(functools.partial(self._swish_backward, step, source, target))
        return target

    def _swish_backward(self, forward: Step, source: Series, target: Series) -> None:
        step = self._again(SWISH_BACKWARD, forward)
        step.d_source, step.d_target = self._gradient(source).start, self._last(target).start

    def _film(self, source: Series | None, norm: nn.GroupNorm, offset: int) -> None:
        """Scales and shifts of a normalisation, from `offset` on."""
        step = self._add(FILM, source or self._scales, self._scales)
        step.source = source.start if source else 0
        step.channels = norm.num_channels
        step.target, step.shifts = self._scales.start + offset, self._shifts.start + offset
        step.weight, step.bias = norm.weight.data_ptr(), norm.bias.data_ptr()
        step.place = self._places[id(norm.weight)]  # the bias is next to it
        self._reverse.append(functools.partial(self._film_backward, step, source, offset))

    def _film_backward(self, forward: Step, source: Series | None, offset: int) -> None:
        step = self._again(FILM_BACKWARD, forward)
        step.d_source = self._gradient(source).start if source else 0
        step.d_target = self._gradient(self._scales).start + offset
        step.d_shifts = self._gradient(self._shifts).start + offset

    def _again(self, kind: int, forward: Step) -> Step:
        """The backward step of a forward one."""
        step = Step.from_buffer_copy(forward)
        step.kind = kind
        self._steps.append(step)
        return step

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
        step = self._add(kind, self._last(target), self._gradient(source))
        step.length = target.length
        step.target += start * source.time
        step.target_time *= 2

    def _normalise_backward(
        self, forward: Step, series: Series, target: Series, residual: Series | None
    ) -> None:
        step = self._again(NORM_BACKWARD, forward)
        step.d_source, step.d_target = self._gradient(series).start, self._last(target).start
        if residual is not None:
            step.d_residual = self._gradient(residual).start
            step.accumulate = self._joins(residual)

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
            step = super().product(seen, weights, self._gradient(series))
            step.accumulate = self._joins(series)
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
        step = self._add(WEIGHT_GRADIENT, gradient, gradient)
        step.paired, step.row_pairs = self._by_rows, row_pairs
        step.segments, step.count = ctypes.addressof(parts), len(parts)
        step.panels, step.depth = found.data_ptr(), found.shape[1]
        step.place = self._places[id(module.bias)]
        # Both halves of a transposed convolution have one bias; the second comes first here.
        step.accumulate = isinstance(module, nn.ConvTranspose1d) and half == 0
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
        step = Step(kind=kind, channels=lanes[0], depth=panels.shape[1], count=len(parts))
        step.segments, step.panels = ctypes.addressof(parts), panels.data_ptr()
        step.plain, step.place = parameter.data_ptr(), self._places[id(parameter)]
        step.lane_stride, step.inner_stride, step.paired = lanes[1], inner[1], paired
        self._steps.append(step)
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


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None
    return found
