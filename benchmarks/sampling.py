"""Time of a plan: plain PyTorch beside what the package computes with, in fp32 and bf16.

A plan alternates dynamics model and planner with guidance of 2, so that each network call is a
conditional and an unconditional half. Paths take turns, and medians are printed. A plan that takes
longer than ``--longest`` is timed for fewer steps and marked ``~``. With ``--peer``, a checkout of
the authors' JAX code (github.com/haldunbalim/MPDiffuser), their sampler is timed in turn with ours
by ``--peer-python``, a Python that has its requirements.

Usage: ``python benchmarks/sampling.py [--presets laptop] [--settings "DDIM 10"] [--paths fp32]
[--candidates 1] [--threads 1] [--seconds 2] [--busy] [--peer PATH]``
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpd_gym.diffusion import Parts, compose, guided, make_move, make_schedule, noise_to_level
from mpd_gym.diffusion import sample as run
from mpd_gym.models import DenoiserConfig, TrajectoryDenoiser, UnetConfig
from mpd_gym.models.backends.choice import InferenceNetworks
from mpd_gym.models.backends.interface import InferenceNetwork
from mpd_gym.models.device import computes_bf16

NX, NU, HORIZON, GUIDANCE = 11, 3, 32, 2.0  # sizes of Hopper
LEVELS = 100
PRESETS = {"laptop": UnetConfig(width=32, multipliers=(1, 2, 4)), "paper": UnetConfig()}
PATHS = ("plain", "fp32", "bf16")
PEER = "authors"


@dataclass(frozen=True)
class Setting:
    """How a plan is sampled.

    Attributes:
        sampler: A key of `mpd_gym.diffusion.make_move`.
        steps: Of the reverse pass.
        warm: Whether a plan starts from the last one.
        levels: K.
    """

    sampler: str
    steps: int
    warm: bool = False
    levels: int = LEVELS


SETTINGS = {
    "K = 100": Setting("ddpm", LEVELS),
    "DDIM 10": Setting("ddim", 10),
    "warm 10": Setting("ddpm", 10, warm=True),
    "warm 4": Setting("ddpm", 4, warm=True),
}


def networks(unet: UnetConfig) -> tuple[TrajectoryDenoiser, TrajectoryDenoiser]:
    """Planner and dynamics model; their weights do not change what they cost."""
    torch.manual_seed(0)
    planner, dynamics = (
        TrajectoryDenoiser(
            DenoiserConfig(NX, NU, HORIZON, output=output, conditions=(("return", 1),), unet=unet)
        ).eval()
        for output in ("trajectory", "observations")
    )
    return planner, dynamics


@torch.no_grad()
def plan(
    models: tuple[InferenceNetwork, InferenceNetwork],
    setting: Setting,
    candidates: int,
    steps: int | None = None,
    device: str = "cpu",
) -> Tensor:
    """Sample candidates for one observation.

    Args:
        models: Planner and dynamics model.
        setting: How.
        candidates: N.
        steps: Take no more than the last ones; None takes all.
        device: Of the models.

    Returns:
        ``[N, H, nx + nu]``.
    """
    schedule = make_schedule("cosine", setting.levels)
    levels = schedule.levels() if setting.warm else schedule.levels(setting.steps)
    levels = levels[-min(steps or setting.steps, setting.steps) :]
    conditioning = [torch.ones(1, size, device=device) for size in (NX, 1, 1)]
    planner, dynamics = (
        guided(model, schedule, *conditioning, GUIDANCE, levels=levels) for model in models
    )
    move = make_move(setting.sampler)
    step = compose("alternating", Parts(planner, dynamics, schedule, NX, move, 0.5))
    generator = torch.Generator(device).manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(candidates, HORIZON, NX + NU, generator=generator, device=device)

    start = noise()
    if setting.warm:
        start = noise_to_level(start, levels[0], schedule, noise, 0.5)
    return run(step, start, levels, noise)


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
    setting, models = SETTINGS[case.setting], networks(PRESETS[case.preset])
    clock, found = time.process_time if options.busy else time.perf_counter, InferenceNetworks()
    planners: dict[str, tuple[Callable[[], object], int]] = {}
    for path in options.paths:
        pair = tuple(found.get(model, path) for model in models)
        make = functools.partial(plan, pair, setting, case.candidates)
        make(1)
        began = clock()
        make(1)
        steps = min(setting.steps, max(int(options.longest / (clock() - began)), 1))
        planners[path] = functools.partial(make, steps), steps
    peer = None
    if options.peer and case.preset == "paper" and case.setting == "K = 100":
        peer = Peer(options.peer_python, options.peer, case.candidates, case.threads)
        planners[PEER] = peer, setting.steps
    samples: dict[str, list[float]] = {path: [] for path in planners}
    while any(sum(part) < options.seconds or len(part) < 3 for part in samples.values()):
        for path, (function, steps) in planners.items():
            began = clock()
            function()
            samples[path].append((clock() - began) * setting.steps / steps)
    if peer is not None:
        peer.close()
    return {
        path: (statistics.median(part), planners[path][1] == setting.steps)
        for path, part in samples.items()
    }


def show(case: Case, found: dict[str, tuple[float, bool]]) -> None:
    """Print one line for each path."""
    reference = found.get("plain", next(iter(found.values())))[0]
    for path, (seconds, whole) in found.items():
        print(
            f"{case.preset:7s} {case.setting:8s} {case.candidates:4d} {case.threads:7d}  {path:7s} "
            f"{' ' if whole else '~'}{1e3 * seconds:10.2f} {reference / seconds:8.2f}",
            flush=True,
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known: dict[str, Any] = {"presets": PRESETS, "settings": SETTINGS, "paths": PATHS}
    for name, values in known.items():
        parser.add_argument(f"--{name}", nargs="+", choices=list(values), default=list(values))
    parser.add_argument("--candidates", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each path")
    parser.add_argument("--longest", type=float, default=5.0, help="seconds of a plan; else cut")
    parser.add_argument("--peer", type=Path, help="checkout of the authors' code")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--busy", action="store_true", help="other programs run: processor time")
    options = parser.parse_args()
    if options.busy and (options.threads != [1] or options.peer):
        parser.error("--busy counts this process's CPU time: expected --threads 1 and no --peer")
    if not computes_bf16():
        options.paths = [path for path in options.paths if path != "bf16"]
    return options


def main() -> None:
    """Time all cases and print the table."""
    options = arguments()
    print("preset  setting     N threads  path            ms  × plain")
    for preset in options.presets:
        for setting in options.settings:
            for candidates in options.candidates:
                for threads in options.threads:
                    torch.set_num_threads(threads)
                    case = Case(preset, setting, candidates, threads)
                    show(case, compare(case, options))


if __name__ == "__main__":
    main()
