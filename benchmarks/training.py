"""Processor time of one training step: plain PyTorch, torch.compile and C, one thread.

Every variant trains the planner of the same size on the same batches. "network" is the loss with
its gradients; "step" is all that `fit` does for a step, drawing the batch and the optimiser
included. Variants take turns in bursts, and medians of processor time are printed, so that other
programs disturb little. Compilation stands in a column of its own and counts in no other.

Usage: ``python benchmarks/training.py [--sizes laptop wide general] [--precisions fp32 bf16]
[--variants plain compiled C] [--bursts 8]``
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpd_gym.datasets import (
    ConditionSpec,
    WindowConfig,
    WindowSampler,
    fit_conditions,
    fit_normalizers,
    load_episodes,
)
from mpd_gym.diffusion import LossConfig, assemble, denoising_loss, make_schedule
from mpd_gym.models import DenoiserConfig, TrajectoryDenoiser, UnetConfig
from mpd_gym.models.backends.choice import training_forward
from mpd_gym.models.backends.library import compiled
from mpd_gym.models.device import computes_bf16
from mpd_gym.training import TrainingConfig, to_tensors
from mpd_gym.training.state import TrainingState
from mpd_gym.types import Episode

NX, NU = 4, 2
Size = tuple[UnetConfig, int, int]  # U-Net, horizon, batch size
SIZES: dict[str, Size] = {
    "laptop": (UnetConfig(32, (1, 2, 4)), 32, 64),
    "wide": (UnetConfig(64, (1, 2, 4)), 32, 64),
    "general": (UnetConfig(32, (1, 2, 4)), 8, 256),
}
VARIANTS = ("plain", "compiled", "C")
BURST = 5  # steps of one variant before the next one's turn, so that each has the cache to itself


def windows(horizon: int) -> WindowSampler:
    """Windows of random episodes."""
    rng = np.random.default_rng(0)
    episodes = [
        Episode(
            observations=rng.normal(size=(257, NX)).astype(np.float32),
            actions=rng.uniform(-1, 1, (256, NU)).astype(np.float32),
            rewards=rng.normal(size=256).astype(np.float32),
            terminations=np.zeros(256, bool),
            truncations=np.arange(256) == 255,
            seed=index,
        )
        for index in range(20)
    ]
    source = load_episodes(episodes)
    config = WindowConfig(horizon=horizon, conditions=(ConditionSpec("return"),))
    normalizers = fit_normalizers(source, "cdf")
    return WindowSampler(source, config, normalizers, fit_conditions(source, config, normalizers))


class Trainer:
    """One variant of a training.

    Args:
        size: U-Net, horizon and batch size.
        variant: One of `VARIANTS`.
        precision: As in `TrainingConfig`.
        data: Windows to train on.
        device: Of the network.
        backend: Of `torch.compile`.
    """

    def __init__(
        self,
        size: Size,
        variant: str,
        precision: str,
        data: WindowSampler,
        device: str = "cpu",
        backend: str = "inductor",
    ) -> None:
        unet, horizon, batch = size
        torch.manual_seed(0)
        config = DenoiserConfig(NX, NU, horizon, conditions=(("return", 1),), unet=unet)
        self._module, self._device = TrajectoryDenoiser(config), torch.device(device)
        self._data, self._precision = data, precision
        self._schedule = make_schedule("cosine", 50)
        training = TrainingConfig(batch_size=batch, precision=precision)
        self._state = TrainingState(self._module, training, self._device, {})
        self._network: Callable[..., Tensor] = self._module
        if variant == "compiled":
            self._network = torch.compile(self._module, dynamic=False, backend=backend)
        elif variant == "C":
            self._network = training_forward(self._module)
        self._noise = torch.Generator(device).manual_seed(0)
        self._batch = to_tensors(self._sample(batch, np.random.default_rng(0)), self._device)

    def network(self) -> None:
        """Loss of one batch and its gradients."""
        bf16 = self._precision == "bf16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=bf16):
            loss = self._loss(self._module, self._batch, self._noise)["loss"]
        torch.autograd.grad(loss, list(self._module.parameters()))

    def step(self) -> None:
        """A step of a training."""
        self._state.advance(self._loss, self._sample)

    def _sample(self, size: int, rng: np.random.Generator) -> Any:
        return assemble(self._data.sample(size, rng), ("return",), device=self._device)

    def _loss(self, _: nn.Module, batch: Any, noise: torch.Generator) -> Mapping[str, Tensor]:
        loss = denoising_loss(self._network, batch, self._schedule, LossConfig(), noise)
        return {"loss": loss}


def burst(function: Callable[[], object]) -> list[float]:
    """Processor time of each of several calls, after one that does not count."""
    function()
    taken = []
    for _ in range(BURST):
        start = time.process_time()
        function()
        taken.append(time.process_time() - start)
    return taken


def compile_time(trainer: Trainer) -> float:
    """Processor time of the first two steps, compilers that they start included."""
    start = sum(os.times()[:4])
    for _ in range(2):
        trainer.network()
        trainer.step()
    return sum(os.times()[:4]) - start


def computes(variant: str, precision: str) -> bool:
    """Whether this machine has C, and instructions for bfloat16 if those are asked for."""
    level = compiled()
    if variant == "C":
        return level is not None and (precision == "fp32" or bool(level.pairs))
    return precision == "fp32" or computes_bf16()


def compare(size: str, precision: str, variants: list[str], bursts: int) -> None:
    """Print one row per variant."""
    for variant in variants:
        if not computes(variant, precision):
            print(f"{size:8s} {precision} {variant:9s} not on this machine")
    names = [variant for variant in variants if computes(variant, precision)]
    data = windows(SIZES[size][1])
    trainers = [Trainer(SIZES[size], name, precision, data) for name in names]
    compiling = [compile_time(trainer) for trainer in trainers]
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in trainers]
    for _ in range(bursts):
        for trainer, (network, step) in zip(trainers, times, strict=True):
            network += burst(trainer.network)
            step += burst(trainer.step)
    medians = [[1e3 * statistics.median(part) for part in pair] for pair in times]
    reference = dict(zip(names, medians, strict=True)).get("compiled", [math.nan, math.nan])
    for name, found, first in zip(names, medians, compiling, strict=True):
        columns = " ".join(
            f"{taken:8.1f} {base / taken:10.2f}"
            for taken, base in zip(found, reference, strict=True)
        )
        print(f"{size:8s} {precision} {name:9s} {columns} {first:8.1f}", flush=True)


def main() -> None:
    """Compare all sizes and precisions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--bursts", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.empty(31 * 2**20, dtype=torch.uint8)  # as `fit`: freed memory is kept
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread")
    print("size     prec variant   network × compiled     step × compiled  first s   (ms)")
    for size in options.sizes:
        for precision in options.precisions:
            compare(size, precision, options.variants, options.bursts)


if __name__ == "__main__":
    main()
