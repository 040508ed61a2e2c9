"""How much noise a denoiser of some width carries from its input to its output.

The trajectories are all zeros, so that the noise to be predicted is the input, scaled by the level:
what is left of the loss, 1 for a network that predicts nothing, is what does not fit through the
network. With x̂_0 predicted the loss would be nothing at once. Trajectories, networks and training
are those of the laptop preset: 32 steps, K = 50, multipliers (1, 2, 4).

Usage: ``python -m studies noise-width [--widths 32 64] [--dims 4 12 24 36] [--steps 1000]``
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mpd_gym.diffusion import Examples, LossConfig, assemble, denoising_loss, make_schedule
from mpd_gym.models import DenoiserConfig, TrajectoryDenoiser, UnetConfig
from mpd_gym.models.backends.choice import training_forward
from mpd_gym.training import TrainingConfig, fit
from mpd_gym.types import Batch

HORIZON, LEVELS = 32, 50


def remaining(width: int, dims: int, steps: int) -> float:
    """Loss of the averaged weights after some steps of training on trajectories of zeros."""
    torch.manual_seed(0)
    network = TrajectoryDenoiser(
        DenoiserConfig(dims - 1, 1, HORIZON, unet=UnetConfig(width, (1, 2, 4)))
    )
    schedule = make_schedule("cosine", LEVELS)

    def sampler(size: int, rng: np.random.Generator) -> Examples:
        states = np.zeros((size, HORIZON, dims - 1), np.float32)
        actions, steps = np.zeros((size, HORIZON, 1), np.float32), np.zeros((size, HORIZON))
        batch = Batch(states[:, 0], states, actions, {}, steps, steps, steps, steps + 1)
        return assemble(batch, ())

    def loss(module: nn.Module, batch: Examples, noise: torch.Generator) -> Mapping[str, Tensor]:
        assert isinstance(module, TrajectoryDenoiser)
        return {
            "loss": denoising_loss(training_forward(module), batch, schedule, LossConfig(), noise)
        }

    config = TrainingConfig(steps=steps, learning_rate=1e-3, schedule="cosine", warmup_steps=200)
    name = f"width-{width}-dims-{dims}"
    result = fit(network, loss, sampler, config, name=name, validation=sampler)
    return float(result.validation["loss"][-1])


def main() -> None:
    """Print the loss that is left, for each width and number of dimensions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--dims", type=int, nargs="+", default=[4, 12, 24, 36])
    parser.add_argument("--steps", type=int, default=1000)
    given = parser.parse_args()
    title = f"noise loss left after {given.steps} steps, {platform.machine()}"
    table = Table("width", *(f"{dims} dims" for dims in given.dims), title=title)
    for width in given.widths:
        losses = [remaining(width, dims, given.steps) for dims in given.dims]
        table.add_row(str(width), *(f"{loss:.3f}" for loss in losses))
    Console().print(table)
