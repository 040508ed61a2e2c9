"""The temporal U-Net in C, forward and backward, for training on a CPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, cast, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mpd_gym.models.backends.gradient_ops import TrainingOps
from mpd_gym.models.backends.interface import TrainingForward
from mpd_gym.models.backends.library import Level, Op
from mpd_gym.models.backends.ops import Program
from mpd_gym.models.backends.unet_ops import write_unet
from mpd_gym.models.denoisers import TrajectoryDenoiser
from mpd_gym.models.temporal_unet import TemporalUnet

__all__ = ["compiled_forward"]

MOST_SHAPES = 4  # of batches whose work space is kept; it is some 30 MB for 64 laptop-size series


def compiled_forward(network: TrajectoryDenoiser, level: Level) -> TrainingForward:
    """Return what computes ``network.forward`` with the layers of the U-Net in C.

    It agrees with the plain network to 1e-4 of the largest entry, gradients included. Under
    autocast to bfloat16 it rounds where `level` multiplies pairs, and stays in float32 elsewhere,
    which is more exact, and faster than numbers that the CPU does not know. What C does not
    compute, such as a gradient of the trajectory, plain PyTorch does.

    Args:
        network: Not causal, with float32 parameters on a CPU, which are read at every call.
        level: The compiled code.
    """

    def forward(
        trajectory: Tensor, k: Tensor, initial: Tensor, conditions: Tensor, present: Tensor
    ) -> Tensor:
        dtype = torch.float32
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        known = dtype in (torch.float32, torch.bfloat16)
        if not known or trajectory.dtype != torch.float32 or trajectory.requires_grad:
            return cast(Tensor, network(trajectory, k, initial, conditions, present))
        embedding = network.embed(k, initial, conditions, present)
        with torch.autocast("cpu", enabled=False):
            paired = dtype == torch.bfloat16 and bool(level.pairs)
            programs = _programs(network.unet, level, paired=paired)
            return _forward(network.unet, programs, trajectory.contiguous(), embedding.float())

    return forward


def _forward(
    unet: TemporalUnet, programs: _Programs, trajectory: Tensor, embedding: Tensor
) -> Tensor:
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
        """Run the first list of ops."""
        ctx.program, ctx.programs = programs.take(unet, *trajectory.shape[:2]), programs
        output: Tensor = ctx.program.forward(trajectory, embedding)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Run the second list of ops, once."""
        program, ctx.program = ctx.program, None
        if program is None:
            raise RuntimeError("backward: a second time, which this graph has no memory for")
        d_embedding, weights = program.gradients(gradient.contiguous())
        ctx.programs.give_back(program)
        return None, None, None, d_embedding, *weights


@final
@dataclass(frozen=True)
class _Training:
    """Both lists of ops for so many series.

    Attributes:
        level: The compiled code.
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

    level: Level
    memory: Program
    backward: ctypes.Array[Op]
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
        self.memory.run(self.level, self.memory.ops, trajectory, output, *self.modulations[:2])
        return output

    def gradients(self, gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the second list; return the gradients of embedding and parameters."""
        found = torch.empty(self.weights_size)
        scale, shift, *others = self.modulations
        written = *others, found
        self.memory.run(self.level, self.backward, gradient, None, scale, shift, gradients=written)
        weights = [found.as_strided(*place) for place in self.places]
        return self.embedding[1].clone(), weights


@final
class _Programs:
    """Idle programs of a U-Net whose weights stay where they are in memory.

    Args:
        level: The compiled code.
        paired: Whether they multiply in bfloat16.
    """

    def __init__(self, level: Level, paired: bool) -> None:
        self._level, self._paired = level, paired
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
        return idle.pop() if idle else self._write(unet, rows, length)

    def give_back(self, program: _Training) -> None:
        """Keep a program for the next call, if the weights are where they were."""
        if program.pointers == self._pointers:
            self._idle.setdefault(program.key, []).append(program)

    def _write(self, unet: TemporalUnet, rows: int, length: int) -> _Training:
        """Write both lists of ops."""
        ops = TrainingOps(rows, self._level.lanes, list(unet.parameters()), paired=self._paired)
        write_unet(ops, unet, ops.weights, ops.modulate(unet), length)
        memory, backward = ops.finish()
        outputs = cast(nn.Conv1d, unet.head[3]).out_channels
        return _Training(
            self._level,
            memory,
            backward,
            *ops.views(memory.work),
            ops.places,
            ops.weights_size,
            outputs,
            (rows, length),
            self._pointers,
        )


_PROGRAMS: WeakKeyDictionary[TemporalUnet, dict[bool, _Programs]] = WeakKeyDictionary()


def _programs(unet: TemporalUnet, level: Level, *, paired: bool) -> _Programs:
    """Those of a U-Net, which live as long as it does."""
    found = _PROGRAMS.setdefault(unet, {})
    if paired not in found:
        found[paired] = _Programs(level, paired)
    return found[paired]
