"""Denoisers in C, for inference on a CPU, in float32 or with products in bfloat16.

A U-Net for control is some sixty layers of a few microseconds each: PyTorch spends more time
between them than in them, and its products of few rows read weights and multiply in turn.
Everything that a reverse pass does not change is out of its loop: scales and shifts of all
normalisations are computed for all levels together, weights are laid out once, and for each number
of series ops and work space are made once. A call then is one call of C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from mpd_gym.errors import InputError
from mpd_gym.models.backends.films import Films
from mpd_gym.models.backends.library import Level
from mpd_gym.models.backends.ops import OpList, Panels, Program, Series
from mpd_gym.models.backends.unet_ops import pack, write_unet
from mpd_gym.models.denoisers import TrajectoryDenoiser
from mpd_gym.models.temporal_unet import Modulation

__all__ = ["CompiledDenoiser"]

# Series that go through the network together: few enough for the caches, many enough to reuse
# weights. Larger batches are cut.
BLOCK_ROWS = 32


@final
class CompiledDenoiser:
    """A `TrajectoryDenoiser` in C, without gradients; see there for shapes.

    Args:
        network: Weights in float32, on a CPU. Those of the U-Net are copied.
        level: The compiled code.
        paired: Whether the factors of products are rounded to bfloat16, which `level` must support.
    """

    def __init__(self, network: TrajectoryDenoiser, level: Level, *, paired: bool = False) -> None:
        self.config = network.config
        self._network, self._level, self._paired = network, level, paired
        self._films = Films(network.unet)
        self._weights = {
            (id(module), half): pack(module, half, level.lanes, paired=paired)
            for module in network.unet.modules()
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d)
            for half in range(module.stride[0] if module.transposed else 1)
        }
        self._programs: dict[int, list[Program]] = {}

    @torch.no_grad()
    def embed(self, k: Tensor, initial: Tensor, conditions: Tensor, present: Tensor) -> Tensor:
        """Embed everything but the trajectory, as `TrajectoryDenoiser.embed`."""
        return self._network.embed(k, initial, conditions, present)

    def modulations(self, embedding: Tensor) -> list[Modulation]:
        """Return scales and shifts of all normalisations side by side: one pair, ``[G, ΣC]``."""
        return [self._films(embedding)]

    def denoise(self, trajectory: Tensor, modulations: Sequence[Modulation]) -> Tensor:
        """Predict as `TrajectoryDenoiser.denoise` does, from `modulations` of this object.

        Raises:
            InputError: If a shape is wrong.
        """
        config, rows = self.config, len(trajectory)
        expected = (rows, config.horizon, config.trajectory_dim)
        if tuple(trajectory.shape) != expected:
            raise InputError(
                f"trajectory: expected shape {list(expected)}; got {list(trajectory.shape)}"
            )
        scale, shift = (part.contiguous() for part in modulations[0])
        if rows % len(scale):
            raise InputError(f"trajectory: expected a multiple of {len(scale)} rows; got {rows}")
        series = trajectory.detach().float().contiguous()
        output = series.new_empty(rows, config.horizon, config.output_dim)
        blocks = math.ceil(rows / BLOCK_ROWS)
        for block in range(blocks):
            first, end = (rows * i // blocks for i in (block, block + 1))
            # A program's work space serves one call at a time; two threads take two programs.
            idle = self._programs.setdefault(end - first, [])
            program = idle.pop() if idle else self._program(end - first)
            parts = series[first:end], output[first:end], scale, shift
            share = rows // len(scale)
            program.run(self._level, program.ops, *parts, share=share, first=first)
            idle.append(program)
        return output.to(trajectory.dtype)

    def _program(self, rows: int) -> Program:
        """Ops and work space for so many series."""
        ops = _InferenceOps(rows, self._level.lanes, paired=self._paired)

        def weights(module: nn.Conv1d | nn.ConvTranspose1d, half: int) -> Panels:
            return self._weights[id(module), half]

        unet = self._network.unet
        write_unet(ops, unet, weights, self._films.offsets, self.config.horizon)
        return ops.program()


@final
class _InferenceOps(OpList):
    """Writes over what is not read again."""

    def normalise(
        self, series: Series, norm: nn.Module, film: int, residual: Series | None, swish: bool
    ) -> Series:
        """Normalise series in place."""
        self._normalise(series, series, norm, film, residual, swish)
        self._changed(series)
        return series
