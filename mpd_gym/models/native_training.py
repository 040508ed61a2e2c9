"""The temporal U-Net in C, forward and backward, for training.

A program has two lists of steps. The first is that of inference, after steps that pack the weights
as they are now; series that the backward pass reads stay in the work space. The second visits the
layers in reverse. The gradient of a series lies at a fixed distance from it, its shadow.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mpd_gym.models.native import library
from mpd_gym.models.native_plan import (
    ADD,
    ALIGNMENT,
    COPY,
    NORM_BACKWARD,
    PACK,
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
from mpd_gym.models.native_unet import around, taps, write_unet
from mpd_gym.models.temporal_unet import TemporalUnet, film_offsets

__all__ = ["native_forward", "trains_natively"]

Convolution = nn.Conv1d | nn.ConvTranspose1d

MOST_SHAPES = 4  # of batches whose work space is kept; it is some 40 MB for 64 laptop-size series


def trains_natively(unet: TemporalUnet, trajectory: Tensor) -> bool:
    """Whether `native_forward` can take the place of a U-Net's layers for such trajectories."""
    plain = trajectory.dtype == torch.float32 and not trajectory.requires_grad
    return plain and not unet.causal and library() is not None


def native_forward(unet: TemporalUnet, trajectory: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`TemporalUnet.forward` with gradients of its weights, of `scale` and of `shift`.

    Args:
        unet: Layers; their parameters are read at every call.
        trajectory: ``[M, L, D]``, float32; gets no gradient.
        scale: Of all normalisations side by side, ``[M, ΣC]``, as `film_offsets` places them; the
            head's comes last.
        shift: As `scale`.

    Returns:
        ``[M, L, D']``.
    """
    tensors = trajectory.contiguous(), scale.contiguous(), shift.contiguous()
    programs = _PROGRAMS.setdefault(unet, _Programs())
    if torch.is_grad_enabled():
        output: Tensor = _Unet.apply(unet, programs, *tensors, *_weights(unet))  # type: ignore[no-untyped-call]
        return output
    program = programs.take(unet, *trajectory.shape[:2])
    output = program.forward(*tensors)
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
        scale: Tensor,
        shift: Tensor,
        *_: Tensor,
    ) -> Tensor:
        """Run the first list of steps."""
        ctx.program, ctx.programs = programs.take(unet, *trajectory.shape[:2]), programs
        ctx.save_for_backward(scale, shift)
        output: Tensor = ctx.program.forward(trajectory, scale, shift)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Run the second list of steps, once."""
        program, ctx.program = ctx.program, None
        if program is None:
            raise RuntimeError("backward: a second time, which this graph has no memory for")
        scale, shift = ctx.saved_tensors
        found = torch.empty(program.weights_size)
        modulations = torch.empty_like(scale), torch.empty_like(shift)
        program.memory.run(
            _library(),
            program.backward,
            gradient.contiguous(),
            None,
            scale,
            shift,
            gradients=(*modulations, found),
        )
        ctx.programs.give_back(program)
        weights = (found.as_strided(*place) for place in program.places)
        return None, None, None, *modulations, *weights


@final
@dataclass(frozen=True)
class _Training:
    """Both lists of steps for so many series.

    Attributes:
        memory: The first list, and the work space of both.
        backward: The second list.
        places: Shape, strides and place of each weight's gradient among all of them.
        weights_size: Numbers in all gradients of weights.
        outputs: D'.
        key: M and L.
        pointers: Where the weights are in memory.
    """

    memory: Program
    backward: ctypes.Array[Step]
    places: list[tuple[tuple[int, ...], tuple[int, ...], int]]
    weights_size: int
    outputs: int
    key: tuple[int, int]
    pointers: list[int]

    def forward(self, trajectory: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Run the first list."""
        output = trajectory.new_empty(*trajectory.shape[:2], self.outputs)
        self.memory.run(_library(), self.memory.steps, trajectory, output, scale, shift)
        return output


@final
class _Programs:
    """Idle programs of a U-Net whose weights stay where they are in memory."""

    def __init__(self) -> None:
        self._pointers: list[int] = []
        self._idle: dict[tuple[int, int], list[_Training]] = {}

    def take(self, unet: TemporalUnet, rows: int, length: int) -> _Training:
        """An idle program, or a new one."""
        pointers = [weight.data_ptr() for weight in _weights(unet)]
        if pointers != self._pointers:
            self._pointers, self._idle = pointers, {}
        while len(self._idle) > MOST_SHAPES:
            self._idle.pop(next(iter(self._idle)))
        idle = self._idle.setdefault((rows, length), [])
        return idle.pop() if idle else _training(unet, rows, length, pointers)

    def give_back(self, program: _Training) -> None:
        """Keep a program for the next call, if the weights are where they were."""
        if program.pointers == self._pointers:
            self._idle.setdefault(program.key, []).append(program)


_PROGRAMS: WeakKeyDictionary[TemporalUnet, _Programs] = WeakKeyDictionary()


def _training(unet: TemporalUnet, rows: int, length: int, pointers: list[int]) -> _Training:
    """Write both lists of steps."""
    assert not unet.causal  # its normalisations have no backward pass here
    plan = _TrainingPlan(rows, int(_library().mpd_lanes()), around(unet), _weights(unet))
    *norms, _ = [norm for norm in unet.modules() if isinstance(norm, nn.GroupNorm)]
    offsets = [*film_offsets(norms), sum(norm.num_channels for norm in norms)]
    write_unet(plan, unet, plan.weights, offsets, length)
    memory, backward = plan.finish()
    outputs = cast(nn.Conv1d, unet.head[3]).out_channels
    places, size = plan.places, plan.weights_size
    return _Training(memory, backward, places, size, outputs, (rows, length), pointers)


@final
class _TrainingPlan(Plan):
    """Writes the first list of steps, and remembers how to write the second.

    Args:
        rows: As in `Plan`.
        lanes: As in `Plan`.
        around: As in `Plan`.
        weights: All parameters of the U-Net's products, in the order of their gradients.
    """

    def __init__(self, rows: int, lanes: int, around: int, weights: list[Tensor]) -> None:
        super().__init__(rows, lanes, around)
        self._reverse: list[Callable[[], object]] = []
        self._shadow = 0
        self._loaded: Series | None = None
        self._written: dict[int, set[int]] = {}
        self._packed: dict[int, tuple[Convolution, int]] = {}  # what panels are of
        places = [0, *itertools.accumulate(weight.numel() for weight in weights)]
        self.weights_size = places.pop()
        self._places = {id(weight): place for weight, place in zip(weights, places, strict=True)}
        self.places = [
            (tuple(weight.shape), weight.stride(), place)
            for weight, place in zip(weights, places, strict=True)
        ]

    def weights(self, module: Convolution, half: int) -> Panels:
        """Panels of a convolution, packed at every call."""
        shape = _Shape.of(module, half)
        panels = self._panels(len(shape.taps) * shape.inputs, shape.outputs)
        lanes, inner = (shape.outputs, shape.output_stride), (shape.inputs, shape.input_stride)
        self._repack(PACK, panels, module.weight, lanes, inner, shape.taps)
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
        self._reverse.append(lambda: Plan.load(self, self._shadow_of(source)))

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
        return super().product(*arguments)

    def normalise(
        self, series: Series, norm: nn.Module, film: int, residual: Series | None, swish: bool
    ) -> Series:
        """Normalise series, and leave them as they are."""
        target = self.series(series.length, series.channels)
        step = self._normalise(series, target, norm, film, residual, swish)
        step.moments = self._size
        self._size = rounded(self._size + 2 * self._rows * step.groups, ALIGNMENT)
        self._reverse.append(functools.partial(self._normalise_backward, step, residual))
        return target

    def finish(self) -> tuple[Program, ctypes.Array[Step]]:
        """The first list with the work space, and the second list."""
        forward, self._steps = self._steps, []
        self._shadow = self._size = rounded(self._size, ALIGNMENT)
        self._size *= 2
        for write in reversed(self._reverse):
            write()
        for step in forward:
            step.scratch = self._size
        backward = self.program()
        memory = Program(array(forward), backward.work, backward.kept)
        return memory, backward.steps

    def _joins(self, series: Series, half: int | None = None) -> bool:
        """Whether a gradient of series has been written before, to which more is to be added."""
        halves = self._written.setdefault(series.start, set())
        before = set(halves)
        halves |= {0, 1} if half is None else {half}
        return bool(before) if half is None else half in before

    def _shadow_of(self, series: Series) -> Series:
        return replace(series, start=series.start + self._shadow)

    def _alternate_backward(self, source: Series, target: Series, start: int) -> None:
        kind = ADD if self._joins(source, start) else COPY
        step = self._add(kind, self._shadow_of(target), self._shadow_of(source))
        step.length = target.length
        step.target += start * source.time
        step.target_time *= 2

    def _normalise_backward(self, forward: Step, residual: Series | None) -> None:
        step = Step.from_buffer_copy(forward)
        step.kind, step.shadow = NORM_BACKWARD, self._shadow
        if residual is not None:
            step.accumulate = self._joins(residual)
        self._steps.append(step)

    def _product_backward(
        self, sources: Sources, panels: Panels, target: Series, every: int, start: int
    ) -> None:
        module, half = self._packed[id(panels)]
        shape = _Shape.of(module, half)
        gradient = self._shadow_of(target)
        if every > 1:
            gradient = super().alternate(gradient, start)
        self._weight_gradient(sources, panels, gradient)
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
            turned = self._panels(len(pairs) * shape.outputs, series.channels)
            lanes, inner = (
                (series.channels, shape.input_stride),
                (shape.outputs, shape.output_stride),
            )
            self._repack(PACK, turned, module.weight, lanes, inner, [begin for begin, _ in pairs])
            bias = self._panels(1, series.channels)
            seen = [(gradient, -shift) for _, shift in pairs]
            weights = Panels(turned, bias, series.channels)
            step = super().product(seen, weights, self._shadow_of(series))
            step.accumulate = self._joins(series)

    def _weight_gradient(self, sources: Sources, panels: Panels, gradient: Series) -> None:
        module, half = self._packed[id(panels)]
        shape = _Shape.of(module, half)
        found = torch.zeros_like(panels.weight)
        parts = array(segments(sources, shape.inputs))
        step = self._add(WEIGHT_GRADIENT, gradient, gradient)
        step.segments, step.count = ctypes.addressof(parts), len(parts)
        step.panels, step.depth = found.data_ptr(), found.shape[1]
        step.place = self._places[id(module.bias)]
        # Both halves of a transposed convolution have one bias; the second comes first here.
        step.accumulate = module.transposed and half == 0
        self._kept += [found, parts]
        lanes, inner = (shape.outputs, shape.output_stride), (shape.inputs, shape.input_stride)
        self._repack(UNPACK, found, module.weight, lanes, inner, shape.taps)

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
    ) -> None:
        """Between a parameter and panels; `lanes` and `inner` are counts and strides."""
        parts = array(Segment(begin, inner[0], 0) for begin in begins)
        step = Step(kind=kind, channels=lanes[0], depth=panels.shape[1], count=len(parts))
        step.segments, step.panels = ctypes.addressof(parts), panels.data_ptr()
        step.plain, step.place = parameter.data_ptr(), self._places[id(parameter)]
        step.lane_stride, step.inner_stride = lanes[1], inner[1]
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
    def of(module: Convolution, half: int) -> _Shape:
        """Read them from a module."""
        strides = module.weight.stride()
        first, second = strides[:2] if module.transposed else strides[1::-1]
        begins = [tap * strides[2] for tap in taps(module, half)]
        return _Shape(module.in_channels, module.out_channels, first, second, begins)


def _weights(unet: TemporalUnet) -> list[Tensor]:
    """Weights and biases of all products."""
    return [
        weight
        for module in unet.modules()
        if isinstance(module, Convolution)
        for weight in module.parameters(recurse=False)
    ]


def _library() -> ctypes.CDLL:
    found = library()
    assert found is not None
    return found
