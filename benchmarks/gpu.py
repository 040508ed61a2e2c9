"""Tests and times on a GPU, in at most 8 minutes: for whoever is lent one for a quarter of an hour.

Runs the tests marked ``cuda`` (of a checkout; a wheel has none), then prints milliseconds beside
their targets on an H200: a plan of the paper preset (K = 100, both networks, guidance), a step of
D-MPC (16 candidates, 10 levels) and a training step (batch 64). "plain" is PyTorch as it comes,
"graph" what the package takes on a GPU, "compiled" `torch.compile` with graphs of its own. "error"
is the largest difference of a network call from plain fp32, relative to the largest output; "ready
s" is the time to the end of the first plan, compilation included. Rows are printed as they are
found, the costly ones last; what no time is left for is named.

Usage: ``python benchmarks/gpu.py [--minutes 8] [--dry-run]``. A dry run takes tiny networks,
the CPU, and plain networks for graphs.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import torch
from sampling import HORIZON, LEVELS, NU, NX, Setting, networks, plan
from torch import Tensor
from training import Trainer, windows

from mpd_gym.diffusion import Parts, compose, guided, make_move, make_schedule, sample
from mpd_gym.models import DenoiserConfig, TrajectoryDenoiser, UnetConfig
from mpd_gym.models.backends.cuda_graph import GraphedDenoiser
from mpd_gym.models.backends.interface import InferenceNetwork
from mpd_gym.models.backends.rounded import RoundedDenoiser
from mpd_gym.models.temporal_unet import Modulation

TARGETS = {"plan": 20, "D-MPC step": 10, "training step": 4}  # ms
TEST_SECONDS = 120
ROW_SECONDS = {"plain": 10, "graph": 10, "compiled": 60}  # that a row needs at least
TIMED_SECONDS = 2.0


class OutOfTimeError(BaseException):
    """The time is up; no `except Exception` of a library catches it."""


@dataclass(frozen=True)
class Machine:
    """Where to measure, and what.

    Attributes:
        device: Of the networks.
        unet: Size of all networks.
        levels: K.
        dry: Whether this is a dry run.
    """

    device: str
    unet: UnetConfig
    levels: int
    dry: bool

    def wait(self) -> None:
        """Until all that was started is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()


class Compiled:
    """A denoiser whose `denoise` is compiled by PyTorch."""

    def __init__(self, network: InferenceNetwork, dry: bool) -> None:
        self.embed, self.modulations = network.embed, network.modulations
        options = {"backend": "eager"} if dry else {"mode": "reduce-overhead"}
        self._denoise = torch.compile(network.denoise, dynamic=False, **options)

    def denoise(self, trajectory: Tensor, modulations: Sequence[Modulation]) -> Tensor:
        """Predict as the network does."""
        torch.compiler.cudagraph_mark_step_begin()
        return self._denoise(trajectory, modulations).clone()


def backend(
    network: TrajectoryDenoiser, variant: str, precision: str, machine: Machine
) -> InferenceNetwork:
    """What computes a network."""
    found = RoundedDenoiser(network) if precision == "bf16" else network
    if variant == "graph" and not machine.dry:
        return GraphedDenoiser(found)
    return Compiled(found, machine.dry) if variant == "compiled" else found


@torch.no_grad()
def dmpc_step(
    models: Sequence[InferenceNetwork],
    setting: Setting,
    candidates: int,
    device: str,
) -> Tensor:
    """Actions from the proposal, then states given them (Zhou et al. 2025); see `plan`."""
    schedule = make_schedule("cosine", setting.levels)
    levels = schedule.levels(setting.steps)
    conditioning = [torch.ones(1, size, device=device) for size in (NX, 0, 0)]
    proposal, dynamics = (
        guided(model, schedule, *conditioning, 1.0, levels=levels) for model in models
    )

    def reverse(denoiser: Callable[[Tensor, int], Tensor], columns: int) -> Tensor:
        def noise() -> Tensor:
            return torch.randn(candidates, HORIZON, columns, device=device)

        parts = Parts(denoiser, None, schedule, NX, make_move("ddpm"), 0.5)
        return sample(compose("planner_only", parts), noise(), levels, noise)

    actions = reverse(proposal, NU)
    states = reverse(lambda x, k: dynamics(torch.cat((x, actions), dim=-1), k), NX)
    return torch.cat((states, actions), dim=-1)


@torch.no_grad()
def relative_error(
    model: TrajectoryDenoiser, other: InferenceNetwork, groups: int, candidates: int
) -> float:
    """Largest difference of a call's outputs, relative to the largest entry of the first."""
    config, device = model.config, next(model.parameters()).device
    sizes = config.observation_dim, config.condition_dim, len(config.conditions)
    levels = torch.arange(1, groups + 1, device=device)
    given = [torch.ones(groups, size, device=device) for size in sizes]
    shape = groups * candidates, config.horizon, config.trajectory_dim
    noise = torch.randn(shape, device=device)
    expected, found = (
        part.denoise(noise, part.modulations(part.embed(levels, *given))) for part in (model, other)
    )
    return float((found - expected).abs().max() / expected.abs().max())


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        task: Key of `TARGETS`.
        candidates: N; 0 for a training.
        variant: ``"plain"``, ``"graph"`` or ``"compiled"``.
        precision: ``"fp32"`` or ``"bf16"``.
    """

    task: str
    candidates: int
    variant: str
    precision: str

    def __str__(self) -> str:
        return f"{self.task:13s} {self.candidates or '-':>3}  {self.variant:8s} {self.precision}"

    def prepare(self, machine: Machine) -> tuple[Callable[[], object], float]:
        """What to time, and its error."""
        if self.task == "training step":
            size, data = (machine.unet, HORIZON, 64), windows(HORIZON)
            compiler = "eager" if machine.dry else "inductor"
            options = self.variant, self.precision, data, machine.device, compiler
            return Trainer(size, *options).step, 0.0
        models = self._networks(machine)
        used = [backend(model, self.variant, self.precision, machine) for model in models]
        groups, make, steps = 2, plan, machine.levels
        if self.task == "D-MPC step":
            groups, make, steps = 1, dmpc_step, min(10, machine.levels)
        pairs = zip(models, used, strict=True)
        error = max(relative_error(*pair, groups, self.candidates) for pair in pairs)
        setting = Setting("ddpm", steps, levels=machine.levels)
        return partial(make, used, setting, self.candidates, device=machine.device), error

    def _networks(self, machine: Machine) -> list[TrajectoryDenoiser]:
        if self.task == "plan":
            return [model.to(machine.device) for model in networks(machine.unet)]
        torch.manual_seed(0)
        return [
            TrajectoryDenoiser(DenoiserConfig(NX, NU, HORIZON, output=output, unet=machine.unet))
            .eval()
            .to(machine.device)
            for output in ("actions", "observations")
        ]


def table() -> Iterator[Row]:
    """All rows, the quick and the wanted ones first."""
    precisions = ("fp32", "bf16")
    for variants in (("graph", "plain"), ("compiled",)):
        for candidates in (1, 64):
            for variant in variants:
                for precision in precisions:
                    yield Row("plan", candidates, variant, precision)
        for precision in precisions:
            for variant in variants:
                yield Row("D-MPC step", 16, variant, precision)
            yield Row("training step", 0, variants[-1], precision)


def milliseconds(function: Callable[[], object], machine: Machine) -> float:
    """Median time of a call."""
    taken: list[float] = []
    calls, seconds = (1, 0.0) if machine.dry else (3, TIMED_SECONDS)
    while len(taken) < calls or sum(taken) < seconds:
        start = time.perf_counter()
        function()
        machine.wait()
        taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken)


def run_tests(seconds: float) -> None:
    """Run the tests that need a GPU, for no longer than that."""
    root = Path(__file__).parent.parent
    files = [str(p) for p in root.glob("tests/test_*.py") if "mark.cuda" in p.read_text()]
    if not files:
        print("tests: none beside this script; left out")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda", *files]
    try:
        subprocess.run(command, cwd=root, timeout=seconds)
    except subprocess.TimeoutExpired:
        print(f"tests: stopped after {seconds:.0f} s")


def measure(machine: Machine, end: float) -> None:
    """Print all rows for which there is time."""
    print("task            N  variant  prec       ms  target    error  ready s")
    for row in table():
        left = end - time.monotonic()
        if left < (0 if machine.dry else ROW_SECONDS[row.variant]):
            print(f"{row}  not run: {left:.0f} s left")
            continue
        try:
            start = time.monotonic()
            function, error = row.prepare(machine)
            function()
            machine.wait()
            ready = time.monotonic() - start
            median = milliseconds(function, machine)
        except Exception as failure:  # the others are still wanted
            print(f"{row}  failed: {type(failure).__name__}: {str(failure).splitlines()[0]}")
            continue
        print(f"{row} {median:8.2f} {TARGETS[row.task]:7d} {error:8.1e} {ready:8.1f}", flush=True)


def stop(number: int, frame: FrameType | None) -> None:
    raise OutOfTimeError


def main() -> None:
    """Run the tests, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    if options.dry_run:
        machine = Machine("cpu", UnetConfig(width=8, multipliers=(1, 2), groups=4), 2, dry=True)
    elif torch.cuda.is_available():
        machine = Machine("cuda", UnetConfig(), LEVELS, dry=False)
        tf32 = torch.backends.cudnn.allow_tf32
        name = torch.cuda.get_device_name()
        print(f"{name}, torch {torch.__version__}, TF32 in fp32 convolutions: {tf32}")
    else:
        raise SystemExit("PyTorch finds no GPU here; --dry-run tries the script without one")
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * options.minutes, 5)  # again, if it was swallowed
    try:
        run_tests(min(TEST_SECONDS, 60 * options.minutes / 3))
        measure(machine, end)
    except OutOfTimeError:
        print(f"stopped after {options.minutes:g} minutes")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
