"""Denoisers in C, for inference on a CPU, in float32 or with products in bfloat16.

A U-Net for control is some sixty layers of a few microseconds each: PyTorch spends more time
between them than in them, and its products of few rows read weights and multiply in turn.
Everything that a reverse pass does not change is out of its loop: scales and shifts of all
normalisations are computed for all levels together, weights are laid out once, and for each number
of series ops and work space are made once. A call then is one call of C.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from mpd_gym.errors import InputError
from mpd_gym.models.backends.library import Level
from mpd_gym.models.backends.ops import OpList, Panels, Program, Series
from mpd_gym.models.backends.unet_ops import (
    Layer,
    embedding_size,
    modulated_channels,
    pack,
    write_films,
    write_unet,
)
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
        network: Weights in float32, on a CPU. Those of the U-Net's products are copied.
        level: The compiled code.
        paired: Whether the factors of the products that a reverse pass repeats are rounded to
            bfloat16, which `level` must support.
    """

    def __init__(self, network: TrajectoryDenoiser, level: Level, *, paired: bool = False) -> None:
        self.config = network.config
        self._network, self._level, self._paired = network, level, paired
        self._weights = {
            (id(module), half): pack(module, half, level.lanes, paired=paired and not film)
            for module in network.unet.modules()
            if isinstance(module, Layer)
            for film in [isinstance(module, nn.Linear)]
            for half in range(2 if isinstance(module, nn.ConvTranspose1d) else 1)
        }
        self._programs: dict[tuple[str, int], list[Program]] = {}

    @torch.no_grad()
    def embed(self, k: Tensor, initial: Tensor, conditions: Tensor, present: Tensor) -> Tensor:
        """Embed everything but the trajectory, as `TrajectoryDenoiser.embed`."""
        return self._network.embed(k, initial, conditions, present)

    def modulations(self, embedding: Tensor) -> list[Modulation]:
        """Return scales and shifts of all normalisations side by side: one pair, ``[G, ΣC]``."""
        width = 2 * modulated_channels(self._network.unet)
        found = self._run(self._write_films, embedding[:, None], width, None)
        scales, shifts = found[:, 0].chunk(2, dim=-1)
        return [(scales, shifts)]

    def denoise(self, trajectory: Tensor, modulations: Sequence[Modulation]) -> Tensor:
        """Predict as `TrajectoryDenoiser.denoise` does, from `modulations` of this object.

        Raises:
            InputError: If a shape is wrong.
        """
        config, rows, groups = self.config, len(trajectory), len(modulations[0][0])
        expected = (rows, config.horizon, config.trajectory_dim)
        if tuple(trajectory.shape) != expected:
            raise InputError(
                f"trajectory: expected shape {list(expected)}; got {list(trajectory.shape)}"
            )
        if rows % groups:
            raise InputError(f"trajectory: expected a multiple of {groups} rows; got {rows}")
        found = self._run(self._write_unet, trajectory, config.output_dim, modulations[0])
        return found.to(trajectory.dtype)

    def _run(
        self,
        write: Callable[[int], Program],
        given: Tensor,
        width: int,
        modulation: Modulation | None,
    ) -> Tensor:
        """Map ``[M, L, D]`` to ``[M, L, width]`` by the programs that `write` writes."""
        given = given.detach().float().contiguous()
        rows, length, _ = given.shape
        output = given.new_empty(rows, length, width)
        share = 1 if modulation is None else rows // len(modulation[0])
        blocks = math.ceil(rows / BLOCK_ROWS)
        for block in range(blocks):
            first, end = (rows * i // blocks for i in (block, block + 1))
            # A program's work space serves one call at a time; two threads take two programs.
            idle = self._programs.setdefault((write.__name__, end - first), [])
            program = idle.pop() if idle else write(end - first)
            parts = given[first:end], output[first:end], modulation
            program.run(self._level, program.ops, *parts, share=share, first=first)
            idle.append(program)
        return output

    def _write_films(self, rows: int) -> Program:
        ops, unet = _InferenceOps(rows, self._level.lanes, paired=False), self._network.unet
        embedding = ops.series(1, embedding_size(unet))
        ops.load(embedding)
        ops.store(write_films(ops, unet, self._panels, embedding))
        return ops.program()

    def _write_unet(self, rows: int) -> Program:
        ops = _InferenceOps(rows, self._level.lanes, paired=self._paired)
        write_unet(ops, self._network.unet, self._panels, self.config.horizon)
        return ops.program()

    def _panels(self, module: Layer, half: int) -> Panels:
        return self._weights[id(module), half]


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
