"""Steps per second of every environment, single and batched, on one core.

Seconds are those that the process really had the core, so other work on the machine matters
little; resets at the ends of episodes count as part of the steps. Usage:
``python benchmarks/environments.py [--copies 1024] [--seconds 1.0] [--repeats 5]``
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
from rich.console import Console
from rich.table import Table

import mpd_gym

SINGLE_TARGETS = {"LQR-v0": 20_000, "CarUMaze-v0": 10_000, "ImagePendulum-v0": 2_000}
BATCHED_TARGETS = {"LQR-v0": 1_000_000, "CarUMaze-v0": 1_000_000}  # with 1024 copies
ACTIONS = 64  # different random actions, drawn before the clock starts


def single(name: str) -> Callable[[int], None]:
    """Return a function that takes many steps of one copy."""
    env = gym.make(name)
    env.reset(seed=0)
    env.action_space.seed(0)
    actions = [0.3 * env.action_space.sample() for _ in range(ACTIONS)]

    def run(steps: int) -> None:
        for index in range(steps):
            _, _, terminated, truncated, _ = env.step(actions[index % ACTIONS])
            if terminated or truncated:
                env.reset()

    return run


def batched(name: str, copies: int) -> Callable[[int], None]:
    """Return a function that takes many steps of all copies, which reset themselves."""
    env = gym.make_vec(name, num_envs=copies, vectorization_mode="vector_entry_point")
    env.reset(seed=0)
    env.action_space.seed(0)
    actions = [0.3 * env.action_space.sample() for _ in range(ACTIONS)]

    def run(steps: int) -> None:
        for index in range(steps):
            env.step(actions[index % ACTIONS])

    return run


def rate(run: Callable[[int], None], seconds: float, repeats: int) -> float:
    """Return the median of several measurements of calls per second, each of about `seconds`."""
    run(10)
    start = time.process_time()
    run(50)
    steps = max(10, int(50 * seconds / (time.process_time() - start)))
    rates = []
    for _ in range(repeats):
        start = time.process_time()
        run(steps)
        rates.append(steps / (time.process_time() - start))
    return statistics.median(rates)


def machine() -> str:
    """Describe what was measured on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":")[1] for line in info.read_text().splitlines() if "model name" in line
        ]
        model = names[0].strip() if names else model
    return (
        f"{model}, one core of {os.cpu_count()}; Python {platform.python_version()}, "
        f"NumPy {np.__version__}, Gymnasium {gym.__version__}, mpd_gym {mpd_gym.__version__}"
    )


def against(value: float, target: int | None) -> str:
    """Return the value as a multiple of its target."""
    return "" if target is None else f"{value / target:.2f} × {target:,}"


def main() -> None:
    """Measure all environments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    table = Table(title="Environment steps per second", caption=machine())
    table.add_column("id")
    for column in ("single", "of target", f"{options.copies} batched", "of target", "gain"):
        table.add_column(column, justify="right")
    for name in sorted(name for name in gym.registry if is_ours(name)):
        one = rate(single(name), options.seconds, options.repeats)
        row = [name, f"{one:,.0f}", against(one, SINGLE_TARGETS.get(name))]
        if gym.spec(name).vector_entry_point is not None:
            calls = rate(batched(name, options.copies), options.seconds, options.repeats)
            many = calls * options.copies
            row += [f"{many:,.0f}", against(many, BATCHED_TARGETS.get(name)), f"{many / one:.0f} ×"]
        table.add_row(*row)
    Console(width=130).print(table)


def is_ours(name: str) -> bool:
    """Return whether the id is one of this package."""
    return mpd_gym.__name__ in str(gym.spec(name).entry_point)


if __name__ == "__main__":
    main()
