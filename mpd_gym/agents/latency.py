"""Steps and samples that keep to a time per action, from times measured on this machine.

What is timed is the agent's own `predict`, so that networks, ranking and a caller's functions all
count, on whatever device and in whatever precision they run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, Self, final

import numpy as np
import torch
from gymnasium import spaces

from mpd_gym.agents.options import SamplingConfig
from mpd_gym.errors import ConfigError

__all__ = [
    "LatencyChoice",
    "LatencyProfile",
    "Prepare",
    "StepTiming",
    "Timings",
    "choose",
    "fewer_samples",
    "measure",
]

ENOUGH_STEPS = 5
"""Steps that samples are given up for; further steps come after samples. On LQR-v0 five DDPM
steps of 50 cost no more than all of them (``python -m studies lqr-steps``)."""

MANY_STEPS = 4  # of the longer of the two plans that are timed
SECONDS = 0.15  # of timing for each number of samples, unless that is fewer than …
MIN_REPEATS, MAX_REPEATS = 3, 25
QUANTILE, LEAST_JITTER = 0.99, 1.1  # a short measurement misses the rarest delays
_FREE = (
    *("num_candidates", "samples_per_candidate", "num_steps"),
    *("warm_start_steps", "action_chunk"),
)

Prepare = Callable[[int, int], Callable[[], object]]
"""``(num_samples, steps)`` to a function that makes one such plan and has run once."""


@final
@dataclass(frozen=True)
class StepTiming:
    """Time of a planning call as a function of its reverse steps, for one number of samples.

    Attributes:
        fixed: Seconds of all but the reverse steps, median.
        per_step: Seconds of one reverse step, median.
        ratios: Each repetition's time ÷ the median of its kind.
    """

    fixed: float
    per_step: float
    ratios: tuple[float, ...]


@final
@dataclass(frozen=True)
class LatencyProfile:
    """Times of one call of `predict` that plans, for one environment, on this machine.

    Attributes:
        timings: By number of trajectories that are sampled, see `SamplingConfig.num_samples`.
    """

    timings: Mapping[int, StepTiming]

    @property
    def jitter(self) -> float:
        """99th percentile of a call's time ÷ its median in all that was timed; at least 1.1."""
        ratios = list(chain.from_iterable(timing.ratios for timing in self.timings.values()))
        return max(float(np.quantile(ratios, QUANTILE)), LEAST_JITTER)

    def seconds(self, num_samples: int, steps: int) -> float:
        """Time that 99 % of the calls keep to.

        Args:
            num_samples: One that was timed.
            steps: Reverse steps.
        """
        timing = self.timings[num_samples]
        return self.jitter * (timing.fixed + timing.per_step * steps)

    def most_steps(self, num_samples: int, seconds: float) -> int:
        """Most reverse steps that keep to a time; 0 where not even one does."""
        timing = self.timings.get(num_samples)
        if timing is None:
            return 0
        return max(math.floor((seconds / self.jitter - timing.fixed) / timing.per_step), 0)

    def __str__(self) -> str:
        lines = [
            f"one plan on this machine; 99 % within {self.jitter:.2f} times the median",
            "   samples  ms without steps  ms per step  p99 ms of 1, 5, 10 steps",
        ]
        for num, timing in sorted(self.timings.items()):
            fixed, step = 1e3 * timing.fixed, 1e3 * timing.per_step
            ends = ", ".join(f"{1e3 * self.seconds(num, steps):.1f}" for steps in (1, 5, 10))
            lines.append(f"{num:10d}  {fixed:16.2f}  {step:11.2f}  {ends}")
        return "\n".join(lines)


@final
@dataclass(frozen=True)
class LatencyChoice:
    """Sampling options that keep to a time, and why.

    Attributes:
        budget: Seconds that were asked for.
        options: ``num_candidates`` and ``num_steps``, or ``warm_start_steps`` where plans are
            warm-started; ``samples_per_candidate`` where those are several.
        seconds: Expected 99th percentile of a call in a running episode.
        first_seconds: The same of the first call of an episode; above `seconds` with warm starts.
        profile: What was measured.
    """

    budget: float
    options: Mapping[str, int]
    seconds: float
    first_seconds: float
    profile: LatencyProfile

    def __str__(self) -> str:
        chosen = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return (
            f"{chosen}: p99 of {1e3 * self.seconds:.1f} ms within {1e3 * self.budget:.1f} ms; "
            f"first plan of an episode {1e3 * self.first_seconds:.1f} ms\n{self.profile}"
        )


def choose(
    options: SamplingConfig,
    num_levels: int,
    budget: float,
    timing: Callable[[int, float], StepTiming | None],
) -> LatencyChoice:
    """Cut steps and samples until a call of `predict` keeps to a time.

    Nothing is raised above what the options ask for. The number of samples is the largest of
    `fewer_samples` at which five steps fit, or all steps asked for if those are fewer; then as many
    of the steps asked for as fit. One sample with a single step is the least. Where the options
    warm-start plans, the steps of warm-started plans are cut and the first plan of each episode,
    which needs a full one, keeps its steps.

    Args:
        options: What is asked for.
        num_levels: K.
        budget: Seconds that 99 % of the calls may take.
        timing: Gives the `StepTiming` of a number of samples, or None if one step takes longer
            than a limit in seconds.

    Raises:
        ConfigError: If `budget` is not a positive number, or less than the least setting takes;
            the message says how long that is.
    """
    if (
        isinstance(budget, bool)
        or not isinstance(budget, (int, float))
        or not 0 < budget < math.inf
    ):
        raise ConfigError(f"latency_budget: expected seconds > 0, got {budget!r}")
    first = options.num_steps or num_levels
    name = "warm_start_steps" if options.warm_start_steps else "num_steps"
    asked = options.warm_start_steps or first
    timings: dict[int, StepTiming] = {}
    for count in fewer_samples(options):
        found = timing(count, budget if count > 1 else math.inf)
        if found is not None:
            timings[count] = found
        profile = LatencyProfile(dict(timings))
        steps = profile.most_steps(count, budget)
        if steps >= min(asked, ENOUGH_STEPS):
            break
    if steps < 1:
        raise ConfigError(
            f"latency_budget: the fastest setting, 1 sample with 1 step, takes "
            f"{profile.seconds(1, 1):.4g} s on this machine; got {budget:g} s. Ask for more, or "
            "train smaller networks"
        )
    steps = min(steps, asked)
    return LatencyChoice(
        budget,
        {**sampling(options, count), name: steps},
        profile.seconds(count, steps),
        profile.seconds(count, first if options.warm_start_steps else steps),
        profile,
    )


def fewer_samples(options: SamplingConfig) -> list[int]:
    """Numbers of samples, falling to 1.

    All of them; with half of the candidates, a quarter and so on; then with half of the samples of
    the one that is left.
    """
    each = options.samples_per_candidate
    candidates = [each * count for count in _halvings(options.num_candidates)]
    return [*candidates, *_halvings(each)[1:]]


def sampling(options: SamplingConfig, num_samples: int) -> dict[str, int]:
    """Options that sample so many trajectories, one of `fewer_samples`."""
    each = options.samples_per_candidate
    found = {"num_candidates": max(num_samples // each, 1)}
    return found if each == 1 else {**found, "samples_per_candidate": min(num_samples, each)}


def measure(
    prepare: Prepare,
    num_samples: int,
    num_levels: int,
    limit: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> StepTiming | None:
    """Time plans of one step and of a few, in turn.

    Args:
        prepare: Makes the function that plans.
        num_samples: Trajectories of a plan.
        num_levels: K.
        limit: Seconds; where a single step takes longer, nothing more is timed.
        clock: Seconds since some moment.

    Returns:
        The timing, or None above the limit.

    Raises:
        ConfigError: If the clock stands still or goes backwards.
    """
    few, many = 1, min(MANY_STEPS, num_levels)
    short = prepare(num_samples, few)
    if min(_timed(short, clock) for _ in range(2)) > limit:
        return None
    plans = (short, prepare(num_samples, many))
    samples: list[list[float]] = []
    began = clock()
    while len(samples) < MIN_REPEATS or (len(samples) < MAX_REPEATS and clock() - began < SECONDS):
        samples.append([_timed(plan, clock) for plan in plans])
    medians = np.median(samples, axis=0)
    if not medians.min() > 0:
        raise ConfigError(
            f"latency_budget: a plan took {medians.min():g} s by this machine's clock, which "
            "stands still or goes backwards; leave latency_budget out"
        )
    per_step = float(medians[1] - medians[0]) / max(many - few, 1)
    if per_step <= 0:  # one level, or lost in noise: let the steps account for everything
        per_step = float(medians.max())
    return StepTiming(
        max(float(medians[0]) - few * per_step, 0.0),
        per_step,
        tuple(float(ratio) for ratio in (np.array(samples) / medians).ravel()),
    )


class Timed(Protocol):
    """What an agent shows in order to be timed."""

    name: str
    options: SamplingConfig
    num_levels: int
    observation_space: spaces.Space[Any]
    config: Any
    objective: Any

    def with_options(self, **options: Any) -> Self:
        """The same agent with other options."""
        ...

    def predict(self, observation: Any, state: Any = None, /) -> tuple[Any, Any]:
        """Choose an action."""
        ...


@final
class Timings:
    """Times of an agent and of all agents that `with_options` made of it, measured once."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], tuple[StepTiming, tuple[object, ...]]] = {}

    def __reduce__(self) -> tuple[type[Timings], tuple[()]]:
        """Times stay with the machine and process that measured them."""
        return Timings, ()

    def measured(
        self, agent: Timed, num_samples: int, limit: float = math.inf
    ) -> StepTiming | None:
        """Timing of an agent.

        Args:
            agent: The agent, with the options that decide what a step costs.
            num_samples: One of `fewer_samples`.
            limit: As in `measure`.

        Raises:
            ConfigError: If the agent does not sample by diffusion.
        """
        if not agent.num_levels:
            raise ConfigError(
                f"latency: {agent.name!r} takes no reverse steps, so there is nothing to time or "
                "cut"
            )
        settings = (agent.config, agent.objective)
        key = (
            repr(agent.options.updated(dict.fromkeys(_FREE, 1))),
            *map(id, settings),
            torch.get_num_threads(),
            tuple(sampling(agent.options, num_samples).values()),
        )
        if key not in self._found:
            timing = measure(replans(agent), num_samples, agent.num_levels, limit)
            if timing is None:
                return None
            self._found[key] = timing, settings  # kept alive, so that their ids stay theirs
        return self._found[key][0]

    def profile(self, agent: Timed) -> LatencyProfile:
        """Profile of an agent for all of `fewer_samples`."""
        found = {count: self.measured(agent, count) for count in fewer_samples(agent.options)}
        return LatencyProfile({count: one for count, one in found.items() if one is not None})


def replans(agent: Timed) -> Prepare:
    """What `measure` times: `predict` in a running episode, each call a warm-started plan."""
    observation = _zeros(agent.observation_space)

    def prepare(num_samples: int, steps: int) -> Callable[[], object]:
        timed = agent.with_options(
            **sampling(agent.options, num_samples),
            num_steps=steps,
            warm_start_steps=steps,
            action_chunk=1,
        )
        _, state = timed.predict(observation)
        return lambda: timed.predict(observation, state)

    return prepare


def _halvings(count: int) -> list[int]:
    """`count`, half of it, a quarter, … 1."""
    return [count, *_halvings(count // 2)] if count > 1 else [1]


def _timed(plan: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    plan()
    return clock() - began


def _zeros(space: spaces.Space[Any]) -> Any:
    """An observation as near to zero as the space allows."""
    if isinstance(space, spaces.Dict):
        return {
            key: _zeros(part) for key, part in space.spaces.items() if isinstance(part, spaces.Box)
        }
    assert isinstance(space, spaces.Box)  # checked by `Spaces`
    return np.clip(np.zeros(space.shape), space.low, space.high)
