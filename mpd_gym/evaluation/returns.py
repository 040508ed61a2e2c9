"""Returns, costs and success with confidence intervals, for anything with `predict`.

An environment may report success, cost and collision at every step, or only when they occur: a step
without the key counts as no success, a cost of 0 and no collision. Success *at the end* is that of
the last step, as in Stable-Baselines3's evaluation and for Fetch; success *ever* is that of any
step, as in LeRobot's, and what counts where the goal moves on or is left again, as in PointMaze.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, final

import gymnasium as gym
import numpy as np
from scipy import stats
from tqdm import tqdm

from mpd_gym.boundary import (
    as_flag,
    as_number,
    check_answer,
    check_spaces,
    stepped,
    succeeded,
)
from mpd_gym.collect.sb3_normalize import warn_normalized
from mpd_gym.envs.checks import make_env
from mpd_gym.errors import InputError, check_integer, check_policy
from mpd_gym.types import Array, BoolArray, Policy, reported

__all__ = [
    "Evaluation",
    "Interval",
    "Rollout",
    "Stopwatch",
    "as_seeds",
    "evaluate",
    "execute_plans",
    "mean_interval",
    "proportion_interval",
    "stacked",
]


GOALS = {"achieved_goal", "desired_goal"}  # Gymnasium-Robotics' convention


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval and the number of trials."""

    mean: float
    low: float
    high: float
    trials: int

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def mean_interval(values: Array, confidence: float = 0.95) -> Interval:
    """Mean and Student-t interval of independent trials.

    Args:
        values: ``[n]``, n >= 1; with one value the interval is unbounded.
        confidence: Level, in (0, 1).
    """
    values = np.asarray(values, float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise InputError(f"values: expected finite numbers of shape [n], n >= 1, got {values!r}")
    mean = float(values.mean())
    if len(values) == 1:
        return Interval(mean, -np.inf, np.inf, 1)
    half = float(stats.sem(values) * stats.t.ppf(0.5 + confidence / 2, len(values) - 1))
    return Interval(mean, mean - half, mean + half, len(values))


def proportion_interval(flags: Array, confidence: float = 0.95) -> Interval:
    """Share of successes and its Wilson score interval, in [0, 1].

    Args:
        flags: ``[n]`` booleans, n >= 1.
        confidence: Level, in (0, 1).
    """
    flags = np.asarray(flags, bool)
    if flags.ndim != 1 or not len(flags):
        raise InputError(f"flags: expected booleans of shape [n], n >= 1, got {flags!r}")
    successes = int(flags.sum())
    bounds = stats.binomtest(successes, len(flags)).proportion_ci(confidence, method="wilson")
    return Interval(successes / len(flags), float(bounds.low), float(bounds.high), len(flags))


@dataclass(frozen=True)
class Evaluation:
    """Measures of E episodes, one entry each, in the order of their seeds.

    Attributes:
        seeds: Seed of each episode's reset.
        returns: Undiscounted return.
        lengths: Steps.
        costs: Sum of ``info["cost"]``; None if no step of any episode reports a cost.
        successes: Success at the end, that is at the last step; None if no step reports success.
        collisions: ``info["collision"]`` at any step; None if no step reports it.
        seconds: Wall-clock time of each call of `predict`, divided by its number of environments,
            ``[calls]``.
        final_errors: Distance between ``achieved_goal`` and ``desired_goal`` at the last step, in
            the environment's units; None without goals.
        successes_ever: Success at any step; None if no step reports success.
    """

    seeds: Array
    returns: Array
    lengths: Array
    costs: Array | None
    successes: BoolArray | None
    collisions: BoolArray | None
    seconds: Array
    final_errors: Array | None = None
    successes_ever: BoolArray | None = None

    def summary(self) -> dict[str, Interval]:
        """Return mean and 95 % interval of every measure that the environment reports."""
        table = {"return": mean_interval(self.returns), "length": mean_interval(self.lengths)}
        if self.successes is not None:
            table["success"] = proportion_interval(self.successes)
        if self.successes_ever is not None:
            table["success ever"] = proportion_interval(self.successes_ever)
        if self.costs is not None:
            table["cost"] = mean_interval(self.costs)
            table["violation"] = proportion_interval(self.costs > 0)
        if self.collisions is not None:
            table["collision"] = proportion_interval(self.collisions)
        if self.final_errors is not None:
            table["final error"] = mean_interval(self.final_errors)
        return table


@final
class Stopwatch:
    """A policy that measures the time of each call of another's `predict`.

    Args:
        policy: The other policy.

    Attributes:
        policy: The other policy.
        seconds: Wall-clock time of each call.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.seconds: list[float] = []

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[Any, Any]:
        """Call the other policy's `predict`."""
        began = time.perf_counter()
        answer = self.policy.predict(observation, state, episode_start, deterministic)
        self.seconds.append(time.perf_counter() - began)
        return answer


def as_seeds(seeds: int | Sequence[int]) -> Sequence[int]:
    """Seeds of episodes; a number n stands for ``range(n)``.

    Raises:
        InputError: If there is none, or one is no whole number of at least 0.
    """
    listed = range(seeds) if _is_whole(seeds) else seeds
    if (
        isinstance(listed, Sequence | np.ndarray)
        and len(listed)
        and all(_is_whole(seed) and seed >= 0 for seed in listed)
    ):
        return listed
    raise InputError(f"seeds: expected at least one, whole numbers >= 0; got {seeds!r}")


def _is_whole(value: object) -> TypeGuard[int]:
    """Whether this is an integer; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def evaluate(
    policy: Policy,
    env_id: str,
    *,
    seeds: int | Sequence[int] = 20,
    num_envs: int = 1,
    env_kwargs: Mapping[str, Any] | None = None,
    reset_options: Sequence[Mapping[str, Any]] | None = None,
    deterministic: bool = False,
    progress: bool | str = False,
) -> Evaluation:
    """Play and measure one episode for each seed.

    Rounds of `num_envs` copies share each call of `predict`. Each copy is reset with its own seed
    and plays one episode, so with a deterministic policy the result does not depend on `num_envs`.

    Args:
        policy: Anything with Stable-Baselines3's `predict`; it gets ``state`` and
            ``episode_start``.
        env_id: Registered id.
        seeds: One for each episode; a number n stands for ``range(n)``.
        num_envs: Copies stepped together.
        env_kwargs: Keyword arguments of the environment.
        reset_options: One `options` mapping for each episode, for exact starts.
        deterministic: Passed to `predict`.
        progress: Show a bar with rate and estimate; a string is its name.

    Raises:
        ConfigError: If the policy has no `predict` or its spaces differ from the environment's,
            the environment cannot be made, or `num_envs` is no whole number of at least 1.
        InputError: If there is no seed, one is no whole number of at least 0, or there is not one
            of `reset_options` for each; if the policy's answer is no action of the environment and
            a state, or a reward or cost is not finite.
    """
    check_policy(policy)
    warn_normalized(policy)
    check_integer("num_envs", num_envs, 1)
    seeds = as_seeds(seeds)
    if reset_options is not None and len(reset_options) != len(seeds):
        raise InputError(f"reset_options: expected {len(seeds)} of them, got {len(reset_options)}")
    envs = [make_env(env_id, env_kwargs) for _ in range(min(num_envs, len(seeds)))]
    records: list[_Record] = []
    seconds: list[float] = []
    try:
        check_spaces(policy, envs[0])
        name = progress if isinstance(progress, str) else None
        with tqdm(total=len(seeds), unit="episode", desc=name, disable=not progress) as bar:
            for first in range(0, len(seeds), len(envs)):
                chunk = slice(first, first + len(envs))
                options = [None] * len(envs) if reset_options is None else reset_options[chunk]
                watch = Stopwatch(policy)
                played = _play(watch, envs, seeds[chunk], options, deterministic)
                seconds += [taken / len(played) for taken in watch.seconds]
                records += played
                bar.update(len(records) - bar.n)
    finally:
        for env in envs:
            env.close()
    return _gather(records, seeds, seconds)


@dataclass
class _Record:
    """One running episode; what it never reported is None."""

    seed: int
    rewards: float = 0.0
    length: int = 0
    cost: float | None = None
    success: bool | None = None
    success_ever: bool | None = None
    collision: bool | None = None
    final_error: float | None = None
    done: bool = False

    def add(self, observation: Any, reward: float, info: Mapping[str, Any], done: bool) -> None:
        self.rewards += reward
        self.length += 1
        self.done = done
        if "cost" in info:
            self.cost = (self.cost or 0.0) + as_number("cost", info["cost"])
        for name, total in (("reward", self.rewards), ("cost", self.cost or 0.0)):
            if not np.isfinite(total):
                raise InputError(
                    f"env: expected a finite {name}, got {info.get(name, reward)} at step "
                    f"{self.length} of seed {self.seed}; look for the cause in the environment"
                )
        success = succeeded(info)
        if success is not None:
            self.success_ever = bool(self.success_ever) or success
        self.success = None if self.success_ever is None else bool(success)
        if "collision" in info:
            self.collision = bool(self.collision) or as_flag("collision", info["collision"])
        if done and isinstance(observation, Mapping) and GOALS <= set(observation):
            gap = np.asarray(observation["achieved_goal"], float) - observation["desired_goal"]
            self.final_error = float(np.linalg.norm(gap))


def _play(
    watch: Stopwatch,
    envs: Sequence[gym.Env[Any, Any]],
    seeds: Sequence[int],
    options: Sequence[Mapping[str, Any] | None],
    deterministic: bool,
) -> list[_Record]:
    """Play one episode in each environment; ended ones keep their last observation."""
    observations = [
        env.reset(seed=int(seed), options=None if option is None else dict(option))[0]
        for env, seed, option in zip(envs, seeds, options, strict=False)
    ]
    records = [_Record(int(seed)) for seed in seeds]
    state, episode_start = None, np.ones(len(records), bool)
    while not all(record.done for record in records):
        answer = watch.predict(stacked(observations), state, episode_start, deterministic)
        actions, state = check_answer(answer, watch.policy, envs[0], (len(records),))
        episode_start = np.zeros(len(records), bool)
        for index, record in enumerate(records):
            if not record.done:
                observation, reward, terminated, truncated, info = stepped(
                    envs[index], actions[index]
                )
                record.add(observation, reward, info, terminated or truncated)
                observations[index] = observation
    return records


def stacked(observations: Sequence[Any]) -> Any:
    """Stack observations, arrays or mappings of arrays, to one batch."""
    if isinstance(observations[0], Mapping):
        return {key: np.stack([row[key] for row in observations]) for key in observations[0]}
    return np.stack(observations)


def _gather(
    records: Sequence[_Record], seeds: Sequence[int], seconds: Sequence[float]
) -> Evaluation:
    def column(name: str, dtype: type) -> Array | None:
        return reported([getattr(record, name) for record in records], dtype)

    return Evaluation(
        seeds=np.asarray(seeds),
        returns=np.array([record.rewards for record in records]),
        lengths=np.array([record.length for record in records]),
        costs=column("cost", float),
        successes=column("success", bool),
        collisions=column("collision", bool),
        seconds=np.asarray(seconds),
        final_errors=column("final_error", float),
        successes_ever=column("success_ever", bool),
    )


def execute_plans(
    plans: Sequence[Array],
    env_id: str,
    *,
    seeds: Sequence[int],
    env_kwargs: Mapping[str, Any] | None = None,
) -> list[Rollout]:
    """Execute whole plans open loop, without new observations.

    Args:
        plans: Actions ``[H, nu]`` for each seed, in environment units.
        env_id: Registered id.
        seeds: Seed of the reset before each plan.
        env_kwargs: Keyword arguments of the environment.

    Returns:
        One rollout for each plan, shorter than the plan if the episode ended early.
    """
    env = make_env(env_id, env_kwargs)
    rollouts = []
    for actions, seed in zip(plans, seeds, strict=True):
        observations, infos, rewards = [env.reset(seed=int(seed))[0]], [], []
        for action in actions:
            observation, reward, terminated, truncated, info = stepped(env, action)
            observations.append(observation)
            rewards.append(reward)
            infos.append(info)
            if terminated or truncated:
                break
        rollouts.append(Rollout(_flat(observations), np.array(rewards), infos))
    env.close()
    return rollouts


@dataclass(frozen=True)
class Rollout:
    """Execution of a plan.

    Attributes:
        observations: ``[t + 1, nx]``; of Dict spaces the part ``observation``.
        rewards: ``[t]``.
        infos: One for each step.
    """

    observations: Array
    rewards: Array
    infos: Sequence[Mapping[str, Any]]


def _flat(observations: Sequence[Any]) -> Array:
    batch = stacked(observations)
    rows = batch["observation"] if isinstance(batch, Mapping) else batch
    return np.asarray(rows, float).reshape(len(rows), -1)
