"""Time of a plan: plain networks and their backends, each beside what the machine allows.

Usage: ``python benchmarks/sampling.py [--presets laptop] [--candidates 1] [--threads 1]
[--settings "DDIM 10"] [--paths plain fp32] [--seconds 2] [--profile] [--peer PATH]``

A plan alternates dynamics model and planner with guidance of 2, so that each network call is a pair
of batches. The floor counts the calls' multiplications and reads of weights at the rates measured
in the same run: a product of large matrices, and reading memory of the weights' size. Plans that
take long are timed for fewer steps and marked ``~``. With ``--peer`` a checkout of the authors' JAX
code (github.com/haldunbalim/MPDiffuser) is timed beside them, in turn, by ``--peer-python``, a
Python that has its requirements.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mpd_gym.diffusion import Parts, compose, guided, make_move, make_schedule, noise_to_level
from mpd_gym.diffusion import sample as run
from mpd_gym.models import DenoiserConfig, TrajectoryDenoiser, UnetConfig
from mpd_gym.models.backends.choice import InferenceNetworks
from mpd_gym.models.device import computes_bf16

NX, NU, HORIZON, GUIDANCE = 11, 3, 32, 2.0  # sizes of Hopper
LEVELS = 100
PRESETS = {
    "laptop": UnetConfig(width=32, multipliers=(1, 2, 4)),
    "paper": UnetConfig(),
}
# name: sampler, steps, and whether a plan starts from the last one
SETTINGS = {
    "K = 100": ("ddpm", LEVELS, False),
    "DDIM 10": ("ddim", 10, False),
    "warm 10": ("ddpm", 10, True),
    "warm 4": ("ddpm", 4, True),
}
PATHS = ("plain", "fp32", "bf16")
DTYPES = {path: torch.bfloat16 if path == "bf16" else torch.float32 for path in PATHS}
PEER = "authors"
clock = time.perf_counter


@dataclass(frozen=True)
class Models:
    """Networks of a preset, and what a call of one of them costs at the least."""

    planner: TrajectoryDenoiser
    dynamics: TrajectoryDenoiser
    networks: InferenceNetworks
    call_flops: float  # of one trajectory
    call_weights: int
    once_flops: float  # of the conditioning of one trajectory and level
    once_weights: int


@functools.cache
def models(preset: str) -> Models:
    """Untrained networks; what they compute does not change what it costs."""
    torch.manual_seed(0)
    planner, dynamics = (
        TrajectoryDenoiser(
            DenoiserConfig(
                NX, NU, HORIZON, output=output, conditions=(("return", 1),), unet=PRESETS[preset]
            )
        ).eval()
        for output in ("trajectory", "observations")
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        conditioning = (torch.ones(1, size) for size in (NX, 1, 1))
        embedding = planner.embed(torch.ones(1, dtype=torch.long), *conditioning)
        modulations = planner.modulations(embedding)
        once = counter.get_total_flops()
        planner.denoise(torch.zeros(1, HORIZON, NX + NU), modulations)
        call = counter.get_total_flops() - once
    total = sum(weight.numel() for weight in planner.parameters())
    outside = sum(
        weight.numel()
        for name, weight in planner.named_parameters()
        if "films" in name or "embedding" in name
    )
    return Models(planner, dynamics, InferenceNetworks(), call, total - outside, once, outside)


@torch.no_grad()
def plan(preset: str, setting: str, path: str, candidates: int, steps: int) -> Tensor:
    """Sample candidates for one observation, in at most `steps` steps of the setting."""
    parts = models(preset)
    sampler, count, warm = SETTINGS[setting]
    schedule = make_schedule("cosine", LEVELS)
    levels = schedule.levels(count) if not warm else schedule.levels()[-count:]
    levels = levels[-steps:]
    conditioning = torch.zeros(1, NX), torch.ones(1, 1), torch.ones(1, 1)
    planner, dynamics = (
        guided(
            parts.networks.get(network, path),
            schedule,
            *conditioning,
            GUIDANCE,
            levels=levels,
        )
        for network in (parts.planner, parts.dynamics)
    )
    move = make_move(sampler)
    step = compose("alternating", Parts(planner, dynamics, schedule, NX, move, 0.5))
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(candidates, HORIZON, NX + NU, generator=generator)

    start = noise()
    if warm:
        start = noise_to_level(start, levels[0], schedule, noise, 0.5)
    return run(step, start, levels, noise)


# --- floors --------------------------------------------------------------------------------------


@functools.cache
def matrix_rate(dtype: torch.dtype, threads: int) -> float:
    """Measured operations per second in products of large matrices."""
    size = 1024
    rows, weight = (torch.randn(size, size).to(dtype) for _ in range(2))
    with torch_threads(threads), torch.inference_mode():
        return 2 * size**3 / shortest(lambda: rows @ weight)


@functools.cache
def read_rate(size: int, threads: int) -> float:
    """Measured bytes per second in reading memory of a size again and again."""
    values = torch.zeros(max(size // 4, 1))
    with torch_threads(threads):
        return 4 * len(values) / shortest(lambda: values.sum())


def floor(preset: str, setting: str, path: str, candidates: int, threads: int) -> float:
    """Seconds that a plan takes at least."""
    parts, dtype = models(preset), DTYPES[path]
    steps = SETTINGS[setting][1]
    size = parts.call_weights * dtype.itemsize
    # Both networks in turn: what one leaves in a cache, the other displaces.
    reading = size / read_rate(2 * size, threads)
    computing = 2 * candidates * parts.call_flops / matrix_rate(dtype, threads)
    once_size = 4 * parts.once_weights
    once = max(
        2 * steps * parts.once_flops / matrix_rate(torch.float32, threads),
        once_size / read_rate(2 * once_size, threads),
    )
    return 2 * (steps * max(reading, computing) + once)


def shortest(function: Callable[[], object], seconds: float = 0.3) -> float:
    """Least time of many calls: what the machine can do, undisturbed."""
    function()
    times = list(timings(function, seconds))
    return min(times)


# --- timing --------------------------------------------------------------------------------------


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timings(function: Callable[[], object], seconds: float) -> Iterator[float]:
    """Times of calls, for so long and at least three of them."""
    end, count = clock() + seconds, 0
    while count < 3 or clock() < end:
        began = clock()
        function()
        yield clock() - began
        count += 1


class Peer:
    """The authors' sampler in a process of its own, which plans when it is told to."""

    def __init__(self, python: str, checkout: Path, candidates: int, threads: int) -> None:
        sizes = {"nx": NX, "nu": NU, "horizon": HORIZON, "levels": LEVELS, "guidance": GUIDANCE}
        options = {"checkout": str(checkout.resolve()), "candidates": candidates, **sizes}
        script = Path(__file__).with_name("peer_sampling.py")
        cores = sorted(os.sched_getaffinity(0))[:threads]
        self._process = subprocess.Popen(
            [python, str(script), json.dumps({**options, "cores": cores})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self()  # compiles

    def __call__(self) -> None:
        """Make one plan."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("plan\n")
        self._process.stdin.flush()
        if self._process.stdout.readline().strip() != "done":
            raise SystemExit("the authors' code failed; its message is above")

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@dataclass(frozen=True)
class Case:
    """One line of the table but for its path."""

    preset: str
    setting: str
    candidates: int
    threads: int


def compare(case: Case, options: argparse.Namespace) -> dict[str, tuple[float, bool]]:
    """Median seconds of each path, timed in turn, and whether all steps were taken."""
    total = SETTINGS[case.setting][1]
    planners: dict[str, tuple[Callable[[], object], int]] = {}
    for path in options.paths:
        make = functools.partial(plan, case.preset, case.setting, path, case.candidates)
        make(1)
        began = clock()
        make(1)
        afford = int(options.longest / (clock() - began))
        steps = min(total, max(afford, 1))
        planners[path] = functools.partial(make, steps), steps
    peer = None
    if options.peer and case.preset == "paper" and case.setting == "K = 100":
        peer = Peer(options.peer_python, options.peer, case.candidates, case.threads)
        planners[PEER] = peer, total
    samples: dict[str, list[float]] = {path: [] for path in planners}
    end = clock() + options.seconds * len(planners)
    while clock() < end or len(samples[options.paths[0]]) < 3:
        for path, (function, steps) in planners.items():
            began = clock()
            function()
            samples[path].append((clock() - began) * total / steps)
    if peer is not None:
        peer.close()
    return {path: (float(np.median(samples[path])), planners[path][1] == total) for path in samples}


def show(case: Case, found: dict[str, tuple[float, bool]]) -> None:
    """Print one line for each path."""
    reference = found.get("plain", next(iter(found.values())))[0]
    for path, (seconds, whole) in found.items():
        least = floor(
            case.preset,
            case.setting,
            "fp32" if path == PEER else path,
            case.candidates,
            case.threads,
        )
        ratio = f"{found[PEER][0] / seconds:8.2f}" if PEER in found else ""
        print(
            f"{case.preset:7s} {case.setting:8s} {case.candidates:4d} {case.threads:7d}  {path:7s} "
            f"{' ' if whole else '~'}{1e3 * seconds:10.2f} {reference / seconds:8.2f} "
            f"{1e3 * least:9.2f} {seconds / least:7.2f} {ratio}",
            flush=True,
        )


def profile(case: Case, path: str) -> None:
    """Print where the time of a plan goes."""
    make = functools.partial(plan, case.preset, case.setting, path, case.candidates)
    steps = min(SETTINGS[case.setting][1], 5)
    make(steps)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        make(steps)
    print(f"\n{case.preset}, {path}, {case.candidates} candidates, {steps} steps")
    table = trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=15)
    print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known: dict[str, Any] = {"presets": PRESETS, "settings": SETTINGS, "paths": PATHS}
    for name, values in known.items():
        parser.add_argument(f"--{name}", nargs="+", choices=list(values), default=list(values))
    parser.add_argument("--candidates", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each path")
    parser.add_argument("--longest", type=float, default=5.0, help="seconds of a plan; else cut")
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    parser.add_argument("--peer", type=Path, help="checkout of the authors' code")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--busy", action="store_true", help="other programs run: count CPU time")
    options = parser.parse_args()
    if options.busy and (options.threads != [1] or options.peer):
        parser.error("--busy counts this process's CPU time: expected --threads 1 and no --peer")
    if not computes_bf16():
        options.paths = [path for path in options.paths if path != "bf16"]
    return options


def main() -> None:
    """Time all cases and print the table."""
    global clock
    options = arguments()
    if options.busy:
        clock = time.process_time
    for threads in options.threads:
        rates = [matrix_rate(dtype, threads) / 1e9 for dtype in (torch.float32, torch.bfloat16)]
        print(
            f"{threads} threads: {rates[0]:.0f} fp32 and {rates[1]:.0f} bf16 GFLOP/s, "
            f"{read_rate(2**28, threads) / 1e9:.1f} GB/s"
        )
    print("preset  setting     N threads  path            ms  × plain  floor ms × floor", end="")
    print(" × authors" if options.peer else "")
    for preset in options.presets:
        for setting in options.settings:
            for candidates in options.candidates:
                for threads in options.threads:
                    case = Case(preset, setting, candidates, threads)
                    with torch_threads(threads):
                        show(case, compare(case, options))
                        if options.profile:
                            for path in options.paths:
                                profile(case, path)


if __name__ == "__main__":
    main()
