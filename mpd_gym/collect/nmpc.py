"""The car's expert: nonlinear MPC that tracks a U-shaped reference through the maze."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import numpy as np

from mpd_gym.collect.car_reference import DEFAULT_PROFILE, SpeedProfile, reference
from mpd_gym.collect.scripted import observation_rows
from mpd_gym.envs.car_model import DEFAULT, CarUMazeParameters, bicycle_step
from mpd_gym.errors import (
    ConfigError,
    InputError,
    SolverError,
    check_choice,
    check_integer,
    require,
)
from mpd_gym.types import Array, BoolArray

__all__ = ["NMPC", "NMPCState", "bicycle_function"]

# Weights of the squared errors in x, y, heading, speed and steering angle, at each step.
_STATE_WEIGHTS = np.array([4.0, 4.0, 1.0, 1.0, 0.5])
_ACTION_WEIGHTS = np.array([0.02, 0.1])  # of acceleration and steering rate
_SOLVER = {
    "print_level": 0,
    "sb": "yes",  # no banner
    "tol": 1e-6,
    "nlp_scaling_method": "none",  # metres, radians and seconds are all near 1
    "warm_start_init_point": "yes",  # the guess is good: do not push it far off its bounds, …
    "mu_init": 1e-2,  # … and begin with a small barrier
}
_NX, _NU = 5, 2


@dataclass(frozen=True)
class NMPCState:
    """State of `NMPC` between steps, for each of n environments.

    Attributes:
        solved: ``[n]``, True while every action since the episode's start is a converged solution;
            do not record an episode with False as expert data.
        steps: ``[n]``, actions since the episode's start.
        starts: ``[n, 5]``, state at the episode's start, where the reference begins.
        guesses: ``[n, horizon, 7]``, first iterate of the next solve: the last solution, actions
            u_i and following states x_{i+1}, shifted by one step.
    """

    solved: BoolArray
    steps: Array
    starts: Array
    guesses: Array


@final
class NMPC:
    """Nonlinear MPC for `CarUMaze-v0`, deterministic, with SB3's `predict`.

    At each step it minimises the squared deviation from
    `mpd_gym.collect.car_reference.reference` over the horizon, subject to the bicycle's dynamics,
    the bounds of actions, speed and steering, and clearance from all walls. The solver is an
    interior-point method (Ipopt: Wächter and Biegler 2006) in CasADi (Andersson et al. 2019). The
    constructor generates the problem once. Each solve starts from the last solution, shifted by
    one step; if that fails, from the reference. The car reaches the goal within 32 steps and then
    stands still.

    `NMPCState` carries the episode's state; the policy keeps none. It can be pickled and then
    generates the problem again.

    Args:
        parameters: Parameters of the environment.
        horizon: Steps of the prediction, at least 2.
        timing: Speed profile of the reference.
        max_iterations: Most iterations of one solve, at least 0.
        on_failure: If the solver does not converge: ``"raise"`` raises SolverError; ``"report"``
            brakes, straightens the wheels, and sets ``state.solved`` to False.

    Raises:
        ConfigError: If an argument is out of range, the car cannot turn in the maze, or the longest
            path takes more time than the profile has.
        MissingExtraError: If CasADi is not installed.
    """

    def __init__(
        self,
        parameters: CarUMazeParameters = DEFAULT,
        *,
        horizon: int = 16,
        timing: SpeedProfile = DEFAULT_PROFILE,
        max_iterations: int = 100,
        on_failure: Literal["raise", "report"] = "raise",
    ) -> None:
        check_integer("horizon", horizon, 2)
        check_integer("max_iterations", max_iterations, 0)
        check_choice("on_failure", on_failure, ("raise", "report"))
        _check_drivable(parameters, timing)
        self.parameters, self.timing = parameters, timing
        self.horizon, self.max_iterations = horizon, max_iterations
        self.on_failure = on_failure
        self._problem = _build(parameters, horizon, max_iterations)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_problem"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._problem = _build(self.parameters, self.horizon, self.max_iterations)

    def predict(
        self,
        observation: Mapping[str, Array],
        state: NMPCState | None = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[Array, NMPCState]:
        """Return acceleration and steering rate, and the next state; see `Policy`.

        `observation` has ``"observation"`` ``[5]`` or ``[n, 5]`` and ``"desired_goal"`` ``[2]`` or
        ``[n, 2]``; other keys are ignored. Actions are float32 within their bounds, ``[2]`` or
        ``[n, 2]``. The policy is always deterministic.

        Raises:
            InputError: If an argument has the wrong type, shape or a non-finite value.
            SolverError: If the solver fails and `on_failure` is ``"raise"``.
        """
        present, goals, single = _read(observation)
        shape = (len(present), self.horizon, _NU + _NX)
        solved, steps, starts, guesses = _recall(state, episode_start, present, shape)
        actions, following = np.empty((len(present), _NU)), np.empty(shape)
        for i in range(len(present)):
            times = (steps[i] + 1 + np.arange(self.horizon + 1)) * self.parameters.dt
            targets = reference(starts[i], goals[i], times, self.parameters, self.timing)
            solution = self._solve(present[i], targets[:-1], guesses[i])
            if solution is None and self.on_failure == "raise":
                raise SolverError(
                    f"the solver did not converge within {self.max_iterations} iterations, in "
                    f"environment {i}, step {steps[i]}, state {present[i]}, goal {goals[i]}: raise "
                    "max_iterations, or use on_failure='report' and discard the episode"
                )
            if solution is None:
                solved[i], actions[i] = False, -present[i, 3:] / self.parameters.dt
                following[i] = _at_rest(targets[1:])
            else:
                actions[i] = solution[0, :_NU]
                following[i] = np.concatenate([solution[1:], _at_rest(solution[-1:, _NU:])])
        bounds = _action_bounds(self.parameters)
        actions = np.clip(actions, -bounds, bounds).astype(np.float32)
        memory = NMPCState(solved=solved, steps=steps + 1, starts=starts, guesses=following)
        return (actions[0] if single else actions), memory

    def _solve(self, present: Array, targets: Array, guess: Array | None) -> Array | None:
        """Return actions and the states that follow them; None if the solver does not converge.

        Args:
            present: State, ``[5]``.
            targets: Reference at the states to come, ``[horizon, 5]``.
            guess: The last solution, shifted, ``[horizon, 7]``; None at an episode's start.
        """
        parameters = np.concatenate([present, targets.ravel()])
        cold = _at_rest(targets)
        for first in [cold] if guess is None else [guess, cold]:
            result = self._problem.solver(x0=first.ravel(), p=parameters, **self._problem.bounds)
            solution = np.asarray(result["x"], dtype=np.float64).reshape(first.shape)
            if self._problem.solver.stats()["success"] and np.isfinite(solution).all():
                return solution
        return None


def bicycle_function(parameters: CarUMazeParameters = DEFAULT) -> Any:
    """Return one step of the environment as a CasADi function (state, action) -> next state.

    Neither actions nor states are clipped: an optimiser states the bounds as constraints.

    Raises:
        MissingExtraError: If CasADi is not installed.
    """
    casadi = require("casadi", "collect", "NMPC")
    state, action = casadi.SX.sym("state", _NX), casadi.SX.sym("action", _NU)
    following = casadi.vertsplit(state)
    for _ in range(parameters.substeps):
        following = bicycle_step(
            following, casadi.vertsplit(action), parameters, functions=casadi, bounded=False
        )
    return casadi.Function("bicycle", [state, action], [casadi.vertcat(*following)])


class _Problem(NamedTuple):
    """A generated solver, and the bounds of its variables and constraints by name."""

    solver: Any
    bounds: dict[str, Array]


def _build(parameters: CarUMazeParameters, horizon: int, max_iterations: int) -> _Problem:
    """Generate the optimal control problem in u_0, x_1, u_1, x_2, …, x_H.

    Its parameters are the present state and the reference at x_1 … x_H.
    """
    casadi = require("casadi", "collect", "NMPC")
    dynamics = bicycle_function(parameters)
    variables = casadi.SX.sym("variables", _NU + _NX, horizon)
    present, targets = casadi.SX.sym("present", _NX), casadi.SX.sym("targets", _NX, horizon)
    gap = np.zeros(_NX)
    clear_low, clear_high = _clearance_bounds(parameters)
    state, cost, constraints = present, 0.0, []
    for i in range(horizon):
        action, following = variables[:_NU, i], variables[_NU:, i]
        constraints += [following - dynamics(state, action), _clearance(following, parameters)]
        cost += casadi.dot(_ACTION_WEIGHTS, action**2)
        cost += casadi.dot(_STATE_WEIGHTS, (following - targets[:, i]) ** 2)
        state = following
    problem = {
        "x": casadi.vec(variables),
        "p": casadi.vertcat(present, casadi.vec(targets)),
        "f": cost,
        "g": casadi.vertcat(*constraints),
    }
    options = {
        "print_time": False,
        "show_eval_warnings": False,
        "calc_lam_p": False,
        "ipopt": {**_SOLVER, "max_iter": max_iterations},
    }
    p, free = parameters, [np.inf] * 3  # x, y and heading: the walls bound them
    low = [*-_action_bounds(p), *np.negative(free), p.min_speed, -p.max_steering]
    high = [*_action_bounds(p), *free, p.max_speed, p.max_steering]
    bounds = {
        "lbx": np.tile(low, horizon),
        "ubx": np.tile(high, horizon),
        "lbg": np.tile([*gap, *clear_low], horizon),
        "ubg": np.tile([*gap, *clear_high], horizon),
    }
    return _Problem(casadi.nlpsol("nmpc", "ipopt", problem, options), bounds)


def _action_bounds(parameters: CarUMazeParameters) -> Array:
    return np.array([parameters.max_acceleration, parameters.max_steering_rate])


def _circles(parameters: CarUMazeParameters) -> tuple[Array, float]:
    """Cover the footprint by circles; return their centres ahead of the rear axle, and radius."""
    length = parameters.front + parameters.rear
    count = math.ceil(length / parameters.width)
    centres = (np.arange(count) + 0.5) * length / count - parameters.rear
    return centres, math.hypot(length / count, parameters.width) / 2


def _clearance(state: Any, parameters: CarUMazeParameters) -> Any:
    """Return x, y and the squared distance from the wall between the arms for each circle.

    Keeping circles clear of the walls is stricter than the exact test, and smooth.
    """
    casadi = require("casadi", "collect", "NMPC")
    _, _, wall_right, wall_top = parameters.inner
    rows = []
    for ahead in _circles(parameters)[0]:
        x = state[0] + ahead * casadi.cos(state[2])
        y = state[1] + ahead * casadi.sin(state[2])
        beyond, beside = casadi.fmax(x - wall_right, 0), casadi.fmax(casadi.fabs(y) - wall_top, 0)
        rows += [x, y, beyond**2 + beside**2]
    return casadi.vertcat(*rows)


def _clearance_bounds(parameters: CarUMazeParameters) -> tuple[Array, Array]:
    """Lower and upper bounds of `_clearance`."""
    centres, radius = _circles(parameters)
    left, bottom, right, top = parameters.outer
    low = [left + radius, bottom + radius, radius**2]
    high = [right - radius, top - radius, np.inf]
    return np.tile(low, len(centres)), np.tile(high, len(centres))


def _at_rest(states: Array) -> Array:
    """Put zero actions before the states ``[H, 5]``."""
    return np.concatenate([np.zeros((len(states), _NU)), states], axis=1)


def _check_drivable(parameters: CarUMazeParameters, timing: SpeedProfile) -> None:
    radius = parameters.separation / 2
    tightest = parameters.wheelbase / math.tan(parameters.max_steering)
    if tightest > radius:
        raise ConfigError(
            f"parameters: half the arms' separation must be at least the turning circle's radius, "
            f"{tightest:.2f} m; got {radius:.2f} m"
        )
    if parameters.arm_length < radius:
        raise ConfigError(
            f"parameters: arm_length must be at least half the separation, {radius:.2f} m, the "
            f"bend's radius; got {parameters.arm_length!r}"
        )
    speed, acceleration = timing.peaks(parameters.max_path)
    if speed > parameters.max_speed or acceleration > parameters.max_acceleration:
        raise ConfigError(
            f"timing: {parameters.max_path} m in {timing.arrival} s with ramps of {timing.ramp} s "
            f"take {speed:.2f} m/s and {acceleration:.2f} m/s²; the car can do "
            f"{parameters.max_speed} m/s and {parameters.max_acceleration} m/s²"
        )


def _read(observation: Mapping[str, Array]) -> tuple[Array, Array, bool]:
    """Return states ``[n, 5]``, goals ``[n, 2]`` and whether a single observation came."""
    keys = ("observation", "desired_goal")
    if not isinstance(observation, Mapping) or not all(key in observation for key in keys):
        found = list(observation) if isinstance(observation, Mapping) else type(observation)
        raise InputError(
            f"observation: expected a dict with the keys {keys}, got {found}; pass only the first "
            "element of env.reset()"
        )
    rows = {}
    for key, size in zip(keys, (_NX, 2), strict=True):
        try:
            rows[key] = observation_rows(observation[key], size)
        except InputError as error:
            raise InputError(f"{key!r} in {error}") from error
    (states, single), (goals, _) = rows["observation"], rows["desired_goal"]
    if len(states) != len(goals):
        raise InputError(
            f"observation: expected one goal for each state, got {len(states)} states and "
            f"{len(goals)} goals"
        )
    return states, goals, single


def _recall(
    state: NMPCState | None, episode_start: Any, present: Array, shape: tuple[int, int, int]
) -> tuple[BoolArray, Array, Array, list[Array | None]]:
    """Return solved, steps, starts and guesses, new where an episode starts."""
    count = len(present)
    if state is None:
        fresh = np.ones(count, dtype=np.bool_)
        return fresh, np.zeros(count, dtype=np.int64), present.copy(), [None] * count
    if not isinstance(state, NMPCState) or state.guesses.shape != shape:
        raise InputError(
            f"state: expected the result of the last call for {count} environments, got {state!r}"
        )
    flags = np.zeros(count) if episode_start is None else episode_start
    fresh = np.atleast_1d(np.asarray(flags, dtype=np.bool_))
    if fresh.shape != (count,):
        raise InputError(f"episode_start: expected shape ({count},), got {fresh.shape}")
    return (
        state.solved | fresh,
        np.where(fresh, 0, state.steps),
        np.where(fresh[:, None], present, state.starts),
        [None if new else guess for new, guess in zip(fresh, state.guesses, strict=True)],
    )
