"""One episode of a policy in an environment."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from mpd_gym.boundary import (
    as_number,
    as_typed,
    check_answer,
    check_spaces,
    decided,
    stepped,
    succeeded,
)
from mpd_gym.collect.storage import Attempt, Decision, Status, store_shard
from mpd_gym.errors import (
    ConfigError,
    InputError,
    SolverError,
    check_function,
    check_integer,
    check_policy,
)
from mpd_gym.types import Array, Episode, Policy, reported
from mpd_gym.validation import (
    EpisodeRules,
    action_box,
    check_episode,
    inside,
    observation_leaves,
)

__all__ = ["Assignment", "Runner", "Views"]


@final
@dataclass(frozen=True)
class Views:
    """Parts of each ``(observation, info)`` to store, and to show to the policy.

    Args:
        frame_stack: Frames that the environment stacks in an observation. Only the newest is
            stored, so each frame is stored once; readers stack them again.
        stored: Function of ``(observation, info)`` that returns the observation to store.
        shown: Function of ``(observation, info)`` that returns the policy's observation.
        space: Space of stored observations; needed with `stored`.

    Raises:
        ConfigError: If `stored` comes without `space`, `frame_stack` is not positive, or a
            function is none.
    """

    frame_stack: int = 1
    stored: Callable[[Any, Mapping[str, Any]], Any] | None = None
    shown: Callable[[Any, Mapping[str, Any]], Any] | None = None
    space: gym.Space[Any] | None = None

    def __post_init__(self) -> None:
        check_integer("frame_stack", self.frame_stack, 1)
        check_function("stored", self.stored)
        check_function("shown", self.shown)
        if self.stored is not None and self.space is None:
            raise ConfigError("space: expected the space of what 'stored' returns, got None")

    def store(self, observation: Any, info: Mapping[str, Any]) -> Any:
        """Return the observation to store."""
        if self.stored is not None:
            return self.stored(observation, info)
        return observation[-1] if self.frame_stack > 1 else observation

    def show(self, observation: Any, info: Mapping[str, Any]) -> Any:
        """Return the observation for the policy."""
        return observation if self.shown is None else self.shown(observation, info)


@final
@dataclass(frozen=True)
class Assignment:
    """The work of every process of a collection; picklable if its parts are.

    Args:
        name: Data set id, for messages.
        spec: Environment.
        policy: Policy, or a function without arguments that makes one in each process.
        seed: Seed of the whole collection.
        deterministic: Passed to the policy's `predict`.
        observation_space: Space of one stored observation.
        views: Parts of the observations to store and to show.
        accept: Which episodes to keep; None for all.
    """

    name: str
    spec: EnvSpec
    policy: Policy | Callable[[], Policy]
    seed: int
    deterministic: bool
    observation_space: gym.Space[Any]
    views: Views = field(default_factory=Views)
    accept: Callable[[Episode], bool] | None = None


@final
class Runner:
    """An environment and a policy that record one candidate after the other.

    A candidate is an index from 0 on. Its seeds follow from it and the collection's seed, and no
    candidate affects the next, so any process may run it. (For this a policy that draws random
    numbers needs `reseed`.)

    Args:
        job: What to run.
    """

    def __init__(self, job: Assignment) -> None:
        self._job = job
        self._policy = _make_policy(job.policy)
        self._env = gym.make(job.spec)
        if self._policy is not job.policy:  # `record` checked one that was not made here
            check_spaces(self._policy, self._env, observes=job.views.shown is None)
        leaves = observation_leaves(job.observation_space)
        self._rules = EpisodeRules(job.name, leaves, action_box(self._env.action_space))

    def close(self) -> None:
        """Free the environment."""
        self._env.close()

    def store(
        self, candidates: Sequence[int], folder: Path, stop: Callable[[], bool]
    ) -> tuple[list[Decision], float]:
        """Run candidates and store the results in one file, also if one of them raises.

        Args:
            candidates: Indices.
            folder: Folder of the shards.
            stop: Called after each episode; True skips the rest.

        Returns:
            Decisions that are now on disk, and the mean seconds per candidate.
        """
        started = time.perf_counter()
        outcomes: list[Attempt] = []
        try:
            for candidate in candidates:
                outcomes.append(self.run(candidate))
                if stop():
                    break
        finally:
            if outcomes:
                store_shard(folder, outcomes)
        decisions = [outcome.decision for outcome in outcomes]
        return decisions, (time.perf_counter() - started) / len(outcomes)

    def run(self, candidate: int) -> Attempt:
        """Run one candidate to the end of its episode.

        Raises:
            DataError: If the environment gave a value that is not finite, or of a wrong shape.
            InputError: If the policy gave an action that is not finite or outside the Box.
        """
        words = np.random.SeedSequence(self._job.seed, spawn_key=(candidate,)).generate_state(2)
        env_seed, policy_seed = (int(word) for word in words)
        if hasattr(self._policy, "reseed"):
            self._policy.reseed(policy_seed)
        tape = _Tape(self._rules, self._job.views, candidate)
        solved = self._play(tape, env_seed)
        if not solved:
            return Attempt(Decision(candidate, Status.UNSOLVED, len(tape.actions)))
        episode = tape.episode(env_seed)
        check_episode(episode, self._rules, candidate)
        accept = self._job.accept
        if accept is not None and not decided("accept", accept, episode):
            return Attempt(Decision(candidate, Status.REJECTED, len(episode)))
        return Attempt(Decision(candidate, Status.STORED, len(episode)), episode)

    def _play(self, tape: _Tape, seed: int) -> bool:
        """Fill the tape; False as soon as the policy's solver fails."""
        observation, info = self._env.reset(seed=seed)
        tape.observe(observation, info)
        state: Any = None
        ended, first = False, True
        while not ended:
            try:
                answer = self._policy.predict(
                    self._job.views.show(observation, info),
                    state,
                    np.array([first]),
                    deterministic=self._job.deterministic,
                )
            except SolverError:
                return False
            if not _solved(answer):
                return False
            raw, state = check_answer(answer, self._policy, self._env)
            action = self._action(raw, tape)
            observation, reward, terminated, truncated, info = stepped(self._env, action.copy())
            tape.step(action, reward, terminated, truncated, info)
            tape.observe(observation, info)
            ended, first = terminated or truncated, False
        return True

    def _action(self, raw: Array, tape: _Tape) -> Array:
        box = self._rules.actions
        action = as_typed(raw, box)
        if ((action >= box.low) & (action <= box.high)).all():
            return action
        if inside(action, box):  # but for rounding
            return np.clip(action, box.low, box.high)
        raise InputError(
            f"policy: expected a finite action inside {box}, got {action} at step "
            f"{len(tape.actions)} of episode {tape.candidate}: clip it in the policy"
        )


@final
class _Tape:
    """Records one episode, step by step."""

    def __init__(self, rules: EpisodeRules, views: Views, candidate: int) -> None:
        self.candidate = candidate
        self.actions: list[Array] = []
        self._rules = rules
        self._views = views
        self._observations: dict[str, list[Array]] = {key: [] for key in rules.leaves}
        self._rewards: list[float] = []
        self._costs: list[float | None] = []
        self._successes: list[bool | None] = []
        self._ends: list[tuple[bool, bool]] = []

    def observe(self, observation: Any, info: Mapping[str, Any]) -> None:
        observation = self._views.store(observation, info)
        for key, box in self._rules.leaves.items():
            value = observation
            for part in key.split("/") if key else ():
                value = value[part]
            self._observations[key].append(np.array(value, dtype=box.dtype))

    def step(
        self,
        action: Array,
        reward: float,
        terminated: bool,
        truncated: bool,
        info: Mapping[str, Any],
    ) -> None:
        self.actions.append(action)
        self._rewards.append(reward)
        self._ends.append((terminated, truncated))
        self._costs.append(as_number("cost", info["cost"]) if "cost" in info else None)
        self._successes.append(succeeded(info))

    def episode(self, seed: int) -> Episode:
        observations = {key: _stack(rows, key) for key, rows in self._observations.items()}
        ends = np.array(self._ends, dtype=np.bool_)
        return Episode(
            observations=observations[""] if "" in observations else observations,
            actions=np.stack(self.actions),
            rewards=np.array(self._rewards, dtype=np.float64),
            terminations=ends[:, 0],
            truncations=ends[:, 1],
            costs=reported(self._costs, np.float64),
            successes=reported(self._successes, np.bool_),
            seed=seed,
        )


def _stack(rows: list[Array], key: str) -> Array:
    shapes = {row.shape for row in rows}
    if len(shapes) > 1:
        raise InputError(
            f"observation {key!r}: expected one shape at all steps, got {sorted(shapes)}"
        )
    return np.stack(rows)


def _make_policy(policy: Policy | Callable[[], Policy]) -> Any:
    made = policy() if callable(policy) and not hasattr(policy, "predict") else policy
    check_policy(made)
    return made


def _solved(answer: Any) -> bool:
    """Return whether the state in an answer says that the solver succeeded, if it says anything."""
    state = answer[1] if isinstance(answer, tuple | list) and len(answer) == 2 else None
    if state is None:
        return True
    solved = state.get("solved") if isinstance(state, Mapping) else getattr(state, "solved", None)
    return solved is None or bool(np.all(solved))
