"""Time of one batch of training windows, from memory and from disk.

Usage: ``python benchmarks/windows.py [--episodes 200] [--steps 1000]``
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from mpd_gym.datasets import (
    ConditionSpec,
    EpisodeSource,
    WindowConfig,
    WindowSampler,
    fit_conditions,
    fit_normalizers,
    load_episodes,
)

BATCH = 64
SIZES = ((3, 1), (11, 3), (17, 6))  # of observation and action: pendulum, Hopper, Walker2d


def write_flat_file(path: Path, episodes: int, steps: int, nx: int, nu: int) -> None:
    """Write random episodes in the layout of D4RL."""
    rng, total = np.random.default_rng(0), episodes * steps
    observations = rng.normal(size=(total, nx)).astype(np.float32)
    ends = np.arange(1, total + 1) % steps == 0
    with h5py.File(path, "w") as file:
        file["observations"] = observations
        file["next_observations"] = np.roll(observations, -1, axis=0)
        file["actions"] = rng.uniform(-1, 1, (total, nu)).astype(np.float32)
        file["rewards"] = rng.normal(size=total).astype(np.float32)
        file["terminals"], file["timeouts"] = np.zeros(total, bool), ends


def microseconds(windows: WindowSampler, seconds: float = 1.0) -> tuple[float, float]:
    """Return median and 99th percentile of the time of one batch."""
    rng, end = np.random.default_rng(1), time.perf_counter() + seconds
    taken: list[float] = []
    while time.perf_counter() < end or len(taken) < 10:
        start = time.perf_counter()
        windows.sample(BATCH, rng)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken)) * 1e6, float(np.quantile(taken, 0.99)) * 1e6


def compare(source: EpisodeSource, nx: int, nu: int) -> None:
    """Print one row per horizon and place."""
    normalizers = fit_normalizers(source, "cdf")
    for horizon in (32, 64):
        config = WindowConfig(horizon=horizon, conditions=(ConditionSpec("return"),))
        conditions = fit_conditions(source, config, normalizers)
        for place, limit in (("memory", 2**34), ("disk", 0)):
            start = time.perf_counter()
            windows = WindowSampler(source, config, normalizers, conditions, memory_limit=limit)
            ready = time.perf_counter() - start
            median, tail = microseconds(windows)
            print(
                f"{nx:4d} {nu:4d} {horizon:4d}  {place:6s} {median:10.0f} {tail:10.0f} {ready:8.2f}"
            )


def main() -> None:
    """Write the data, and time batches of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    print(f"batches of {BATCH} windows, {options.episodes} episodes of {options.steps} steps")
    print("  nx   nu    H  from    median µs     p99 µs  set-up s")
    with tempfile.TemporaryDirectory() as folder:
        for nx, nu in SIZES:
            path = Path(folder) / f"{nx}-{nu}.hdf5"
            write_flat_file(path, options.episodes, options.steps, nx, nu)
            compare(load_episodes(path), nx, nu)


if __name__ == "__main__":
    main()
