"""Time of one training step: the plain network and optimiser against what `fit` computes with.

Plain: `TrajectoryDenoiser.forward`, torch's clipping and fused Adam over separate parameters.
Fast: `training_forward` and one vector of parameters. Bursts of steps of all variants are taken
in turn, and medians of the processor's time are printed, so that other programs disturb little. The
floor is the operations of the step (those of products and convolutions) over the rate of one large
convolution.

Usage: ``python benchmarks/training.py [--widths 32 64] [--horizons 32 64] [--repeats 6]``
"""

from __future__ import annotations

import argparse
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from mpd_gym.datasets import (
    ConditionSpec,
    WindowConfig,
    WindowSampler,
    fit_conditions,
    fit_normalizers,
    load_episodes,
)
from mpd_gym.diffusion import LossConfig, NoiseSchedule, assemble, denoising_loss, make_schedule
from mpd_gym.models import DenoiserConfig, TrajectoryDenoiser, UnetConfig
from mpd_gym.models.backends.choice import training_forward
from mpd_gym.training import TrainingConfig, averaging_rate, to_tensors
from mpd_gym.training.log import Log
from mpd_gym.training.state import TrainingState
from mpd_gym.types import Episode

BATCH, NX, NU = 64, 4, 2
BURST = 5  # steps of one variant before the next one's turn, so that each has the cache to itself
CPU = torch.device("cpu")
PARTS = ("sampling", "forward", "backward", "optimiser")


class Clock:
    """Processor time between marks, summed by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._last = time.process_time()

    def mark(self, name: str) -> None:
        """Charge the time since the last mark to `name`."""
        now = time.process_time()
        self.spent[name] += now - self._last
        self._last = now


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
        for index in range(50)
    ]
    source = load_episodes(episodes)
    config = WindowConfig(horizon=horizon, conditions=(ConditionSpec("return"),))
    normalizers = fit_normalizers(source, "cdf")
    return WindowSampler(source, config, normalizers, fit_conditions(source, config, normalizers))


def network(width: int, horizon: int) -> TrajectoryDenoiser:
    """The laptop preset's planner, or a wider one."""
    torch.manual_seed(0)
    unet = UnetConfig(width, (1, 2, 4))
    return TrajectoryDenoiser(
        DenoiserConfig(NX, NU, horizon, conditions=(("return", 1),), unet=unet)
    )


class Step:
    """One step of one variant, with a clock.

    Args:
        fast: What `fit` does; False: the plain version.
        precision: As in `TrainingConfig`.
    """

    def __init__(self, width: int, horizon: int, data: WindowSampler, fast: bool, precision: str):
        self.name = f"{'fast' if fast else 'plain'} {precision}"
        self.clock, self._data = Clock(), data
        self._schedule: NoiseSchedule = make_schedule("cosine", 50)
        self._module = network(width, horizon)
        self._fast, self._bf16 = fast, precision == "bf16"
        self._rng, self._noise = np.random.default_rng(0), torch.Generator().manual_seed(0)
        if fast:
            config = TrainingConfig(precision=precision)
            self._state = TrainingState(self._module, config, CPU, {})
        else:
            parameters = list(self._module.parameters())
            self._optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)

    def __call__(self) -> None:
        """Take a step."""
        self.clock.mark("between")
        if self._fast:
            self._state.advance(self._loss, self._sample)
        else:
            batch = to_tensors(self._sample(BATCH, self._rng), CPU)
            with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
                loss = self._loss(self._module, batch, self._noise)["loss"]
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(self._module.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()
        self.clock.mark("optimiser")

    def _sample(self, size: int, rng: np.random.Generator) -> Any:
        batch = assemble(self._data.sample(size, rng), ("return",))
        self.clock.mark("sampling")
        return batch

    def _loss(self, module: nn.Module, batch: Any, noise: torch.Generator) -> Mapping[str, Tensor]:
        assert isinstance(module, TrajectoryDenoiser)
        function = training_forward(module) if self._fast else module
        loss = denoising_loss(function, batch, self._schedule, LossConfig(), noise)
        self.clock.mark("forward")
        return {"loss": loss}


def gigaflops(width: int, horizon: int) -> float:
    """Operations of one step, 10^9."""
    module = network(width, horizon)
    rows = torch.randn(BATCH, horizon, NX + NU)
    others = torch.ones(BATCH, dtype=torch.long), torch.randn(BATCH, NX), torch.randn(BATCH, 1)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(module(rows, *others, torch.ones(BATCH, 1)).square().mean())
    return float(counter.get_total_flops()) / 1e9


def peak(dtype: torch.dtype) -> float:
    """Rate of a large convolution, 10^9 operations per second; the best of several."""
    rows, channels, length, taps = 64, 128, 32, 5
    image = torch.randn(rows, channels, 1, length + taps - 1).to(dtype)
    kernel = torch.randn(channels, channels, 1, taps).to(dtype)
    image, kernel = (value.to(memory_format=torch.channels_last) for value in (image, kernel))
    work = 2e-9 * rows * length * taps * channels**2
    return work / min(seconds(lambda: nn.functional.conv2d(image, kernel), 50))


def seconds(function: Callable[[], object], repeats: int) -> list[float]:
    """Processor time of each of several calls, after two that do not count."""
    taken = []
    for index in range(repeats + 2):
        start = time.process_time()
        function()
        if index >= 2:
            taken.append(time.process_time() - start)
    return taken


def compare(width: int, horizon: int, repeats: int, peaks: Mapping[str, float]) -> None:
    """Print one row per variant."""
    data, work = windows(horizon), gigaflops(width, horizon)
    steps = [
        Step(width, horizon, data, fast, precision)
        for precision in ("fp32", "bf16")
        for fast in (False, True)
    ]
    current: list[Step] = []
    hook = register_optimizer_step_pre_hook(lambda *_: current[0].clock.mark("backward"))
    times: dict[str, list[float]] = defaultdict(list)
    try:
        for index in range(repeats + 1):
            for step in steps:
                current[:] = [step]
                taken = seconds(step, BURST)
                if index:
                    times[step.name] += taken
    finally:
        hook.remove()
    plain = {p: float(np.median(times[f"plain {p}"])) for p in ("fp32", "bf16")}
    for step in steps:
        median, precision = float(np.median(times[step.name])), step.name.split()[1]
        floor = work / peaks[precision]
        total = sum(step.clock.spent[part] for part in PARTS)
        shares = " ".join(f"{100 * step.clock.spent[part] / total:9.1f}" for part in PARTS)
        print(
            f"{width:5d} {horizon:3d}  {step.name:10s} {1e3 * median:7.1f} "
            f"{plain['fp32'] / median:6.2f} {plain[precision] / median:6.2f} "
            f"{1e3 * floor:7.1f} {median / floor:6.2f}  {shares}",
            flush=True,
        )


def bookkeeping(width: int) -> None:
    """Print what averaging and logging cost for each step."""
    module, config = network(width, 32), TrainingConfig()
    weights = torch.zeros(sum(parameter.numel() for parameter in module.parameters()))
    average, log, values = weights.clone(), Log("training"), {"loss": torch.ones(())}

    def record() -> None:
        for _ in range(config.log_every):
            log.add(values)
        log.close(config.log_every)

    averaging = min(seconds(lambda: average.lerp_(weights, averaging_rate(config, 9)), 50))
    logging = min(seconds(record, 50)) / config.log_every
    print(
        f"width {width}: per step, averaging takes {1e6 * averaging / config.ema_every:.0f} µs, "
        f"logging {1e6 * logging:.0f} µs"
    )


def main() -> None:
    """Measure the peaks, and compare all sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--horizons", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--repeats", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.empty(31 * 2**20, dtype=torch.uint8)  # as `fit`: freed memory is kept
    peaks = {"fp32": peak(torch.float32), "bf16": peak(torch.bfloat16)}
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread; "
        f"peak {peaks['fp32']:.0f} GFLOP/s fp32, {peaks['bf16']:.0f} bf16; batch {BATCH}"
    )
    print(
        "width   H  variant    ms/step  /plain fp32, same  floor ms  /floor   "
        + " ".join(f"{part:>9s}" for part in PARTS)
        + "  (% of the step)"
    )
    for width in options.widths:
        for horizon in options.horizons:
            compare(width, horizon, options.repeats, peaks)
        bookkeeping(width)


if __name__ == "__main__":
    main()
