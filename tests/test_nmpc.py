"""The NMPC expert: its reference, its dynamics, what it carries, how it fails, where it arrives."""

from __future__ import annotations

import pickle
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mpd_gym.collect.car_reference import SpeedProfile, reference
from mpd_gym.collect.nmpc import NMPC, NMPCState, bicycle_function
from mpd_gym.envs.car_model import (
    DEFAULT,
    CarUMazeParameters,
    collides,
    draw_starts,
    path_length,
    transition,
)
from mpd_gym.envs.car_umaze import CarUMazeEnv
from mpd_gym.errors import ConfigError, InputError, MissingExtraError, SolverError

pytest.importorskip("casadi")

DT = DEFAULT.dt
DENSE = np.linspace(0.0, 12.0, 1201)  # s


@pytest.fixture(scope="module")
def policy() -> NMPC:
    return NMPC(on_failure="report")


def pairs(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return draw_starts(np.random.default_rng(seed).random((count, 6)), DEFAULT)


def observations(states: np.ndarray, goals: np.ndarray) -> dict[str, np.ndarray]:
    return {"observation": states, "achieved_goal": states[..., :2], "desired_goal": goals}


def drive(policy: NMPC, states: np.ndarray, goals: np.ndarray, steps: int) -> tuple[Any, ...]:
    """Closed loop on all pairs at once: states [T + 1, n, 5], actions [T, n, 2], last memory."""
    memory, visited, taken = None, [states], []
    for _ in range(steps):
        actions, memory = policy.predict(observations(visited[-1], goals), memory)
        taken.append(actions)
        visited.append(transition(visited[-1], actions))
    return np.array(visited), np.array(taken), memory


# The mathematics


@pytest.mark.parametrize(
    "parameters", [DEFAULT, CarUMazeParameters(wheelbase=1.3, dt=0.2, substeps=5)]
)
def test_casadi_and_numpy_dynamics_agree(parameters: CarUMazeParameters) -> None:
    """On random states and actions from which no bound on speed and steering is passed."""
    rng = np.random.default_rng(1)
    function = bicycle_function(parameters)
    bounds = np.array([parameters.max_acceleration, parameters.max_steering_rate])
    actions = rng.uniform(-bounds, bounds, (4000, 2))
    states = np.stack(
        [
            *rng.uniform(-9.0, 9.0, (3, 4000)),
            rng.uniform(parameters.min_speed, parameters.max_speed, 4000),
            rng.uniform(-parameters.max_steering, parameters.max_steering, 4000),
        ],
        axis=-1,
    )
    ends = states[:, 3:] + parameters.dt * actions
    low, high = (parameters.min_speed, -parameters.max_steering), (parameters.max_speed, 0.6)
    kept = ((ends >= low) & (ends <= high)).all(axis=1)
    assert kept.sum() > 1000
    states, actions = states[kept], actions[kept]
    expected = transition(states, actions, parameters)
    found = np.array(function(states.T, actions.T)).T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_casadi_dynamics_do_not_clip() -> None:
    """Beyond the bounds derivatives must not vanish: the optimiser states them as constraints."""
    following = np.array(bicycle_function()([0, 0, 0, 3.9, 0], [3, 0])).ravel()
    assert following[3] == pytest.approx(3.9 + 3 * DT)


def test_distance_is_the_integral_of_speed() -> None:
    timing = SpeedProfile(arrival=8.0, ramp=1.5)
    for length, first_speed in ((17.0, 0.0), (13.0, 1.2), (0.0, 0.0)):
        distance, speed = timing.travelled(DENSE, length, first_speed)
        integral = np.concatenate([[0.0], np.cumsum((speed[1:] + speed[:-1]) / 2 * 0.01)])
        np.testing.assert_allclose(distance, integral, atol=1e-3)
        assert speed[0] == pytest.approx(first_speed)
        np.testing.assert_allclose(distance[DENSE >= 8.0], length, atol=1e-9)
        np.testing.assert_allclose(speed[DENSE >= 8.0], 0.0, atol=1e-9)


def test_peaks_are_those_of_the_profile() -> None:
    timing = SpeedProfile()
    _, speed = timing.travelled(DENSE, 20.0, 0.0)
    peak_speed, peak_acceleration = timing.peaks(20.0)
    assert speed.max() == pytest.approx(peak_speed, abs=1e-6)
    assert np.abs(np.diff(speed) / 0.01).max() == pytest.approx(peak_acceleration, rel=1e-3)


def test_reference_runs_from_start_to_goal_through_the_maze() -> None:
    for start, goal in zip(*pairs(50), strict=True):
        path = reference(start, goal, DENSE)
        np.testing.assert_allclose(path[0, :2], start[:2], atol=1e-9)
        np.testing.assert_allclose(path[-1, :2], goal, atol=1e-9)
        assert path[-1, 3] == 0.0 and path[-1, 4] == 0.0
        assert not collides(path).any()
        assert np.hypot(path[:, 0] - 6.0, path[:, 1]).min() > 1.4  # round the wall's end


def test_reference_is_as_long_as_the_centre_line_less_the_cut_corners() -> None:
    """A half circle of radius 2 replaces 8 m of the rectangular bend; offsets bend it a little."""
    for start, goal in zip(*pairs(50), strict=True):
        expected = path_length(start[:2], goal) - 8.0 + 2.0 * np.pi
        assert abs(_length(reference(start, goal, DENSE)) - expected) < 1.0
        start[1], goal[1] = np.sign([start[1], goal[1]]) * 2.0
        assert _length(reference(start, goal, DENSE)) == pytest.approx(expected, abs=1e-3)


def _length(path: np.ndarray) -> float:
    return float(np.hypot(*np.diff(path[:, :2], axis=0).T).sum())


def test_reference_heading_and_speed_are_those_of_its_motion() -> None:
    for start, goal in zip(*pairs(20), strict=True):
        path = reference(start, goal, DENSE)
        motion = np.diff(path[:, :2], axis=0) / 0.01
        middle = (path[1:] + path[:-1]) / 2
        smooth = np.abs(np.diff(path[:, 4])) < 0.05  # not where the half circle begins or ends
        assert smooth.sum() >= len(smooth) - 2
        np.testing.assert_allclose(np.hypot(*motion.T)[smooth], middle[smooth, 3], atol=0.02)
        moving = smooth & (middle[:, 3] > 0.1)
        error = np.arctan2(motion[:, 1], motion[:, 0]) - middle[:, 2]
        error = (error + np.pi) % (2 * np.pi) - np.pi
        assert np.abs(error[moving]).max() < 0.02
        assert np.abs(np.diff(path[:, 2])).max() < 0.1  # continuous
        assert np.abs(path[-1, 2]) == pytest.approx(np.pi)


def test_reference_does_not_depend_on_the_window_it_is_asked_for() -> None:
    for start, goal in zip(*pairs(10), strict=True):
        whole = reference(start, goal, DENSE)
        np.testing.assert_array_equal(reference(start, goal, DENSE[900:]), whole[900:])


def test_reference_turns_counted_from_the_start() -> None:
    start, goal = (array[0] for array in pairs(1))
    turned = reference(start + np.array([0, 0, 4 * np.pi, 0, 0]), goal, DENSE)
    expected = reference(start, goal, DENSE) + np.array([0, 0, 4 * np.pi, 0, 0])
    np.testing.assert_allclose(turned, expected, atol=1e-12)


def test_reference_on_the_goal_stands_still() -> None:
    path = reference(np.array([2.0, 2.3, np.pi, 0.0, 0.0]), np.array([2.0, 2.3]), DENSE)
    np.testing.assert_allclose(path - path[0], 0.0, atol=1e-9)
    np.testing.assert_allclose(path[0, :2], [2.0, 2.3], atol=1e-9)


def test_first_solution_is_feasible_and_tracks_the_reference(policy: NMPC) -> None:
    """What the solver returns obeys the bicycle, all bounds and the exact walls."""
    states, goals = pairs(5)
    _, memory = policy.predict(observations(states, goals))
    actions, planned = memory.guesses[:, :-1, :2], memory.guesses[:, :-1, 2:]  # u_1, x_2, u_2, …
    np.testing.assert_allclose(
        transition(planned[:, :-1], actions[:, 1:]), planned[:, 1:], atol=1e-5
    )
    assert (np.abs(actions) <= np.array([3.0, 1.5]) + 1e-6).all()
    assert (planned[..., 3] <= 4.0).all() and (np.abs(planned[..., 4]) <= 0.6 + 1e-6).all()
    assert not collides(planned).any()
    times = np.arange(2, planned.shape[1] + 2) * DT
    for start, goal, plan in zip(states, goals, planned, strict=True):
        assert np.abs(reference(start, goal, times)[:, :2] - plan[:, :2]).max() < 0.1


# What is promised


def test_single_and_batch_give_the_same_actions(policy: NMPC) -> None:
    states, goals = pairs(4)
    together, memory = policy.predict(observations(states, goals))
    again, _ = policy.predict(observations(transition(states, together), goals), memory)
    assert together.shape == (4, 2) and together.dtype == np.float32
    for i in range(4):
        alone, own = policy.predict(observations(states[i], goals[i]))
        assert alone.shape == (2,)
        np.testing.assert_array_equal(alone, together[i])
        then, _ = policy.predict(observations(transition(states[i], alone), goals[i]), own)
        np.testing.assert_array_equal(then, again[i])


def test_equal_inputs_give_equal_actions_whatever_came_before(policy: NMPC) -> None:
    states, goals = pairs(3)
    _, _, memory = drive(policy, states, goals, 3)
    first, _ = policy.predict(observations(states, goals), memory)
    drive(policy, *pairs(3, seed=9), 2)
    second, _ = policy.predict(observations(states, goals), memory, deterministic=True)
    np.testing.assert_array_equal(first, second)


def test_episode_start_resets_one_by_one(policy: NMPC) -> None:
    states, goals = pairs(3)
    visited, _, memory = drive(policy, states, goals, 4)
    now = visited[-1].copy()
    now[1] = states[1]
    flags = np.array([False, True, False])
    before = pickle.dumps((memory, flags))
    actions, following = policy.predict(observations(now, goals), memory, episode_start=flags)
    assert pickle.dumps((memory, flags)) == before  # nothing that was passed in is changed
    np.testing.assert_array_equal(following.steps, [5, 1, 5])
    np.testing.assert_array_equal(following.starts, states)
    fresh, _ = policy.predict(observations(states[1], goals[1]))
    np.testing.assert_array_equal(actions[1], fresh)
    kept, _ = policy.predict(observations(now, goals), memory)
    np.testing.assert_array_equal(actions[[0, 2]], kept[[0, 2]])


def test_pickled_copy_acts_alike(policy: NMPC) -> None:
    copy = pickle.loads(pickle.dumps(policy))
    states, goals = pairs(2)
    _, _, memory = drive(policy, states, goals, 2)
    np.testing.assert_array_equal(
        policy.predict(observations(states, goals), memory)[0],
        copy.predict(observations(states, goals), pickle.loads(pickle.dumps(memory)))[0],
    )
    assert copy.on_failure == "report"


def test_wrong_guess_is_made_good_by_the_reference(policy: NMPC) -> None:
    states, goals = pairs(1)
    _, memory = policy.predict(observations(states, goals))
    spoilt = replace(memory, guesses=np.full_like(memory.guesses, 1e30))
    action, following = policy.predict(observations(states, goals), spoilt)
    assert following.solved.all()
    expected, _ = policy.predict(observations(states, goals), memory)
    np.testing.assert_allclose(action, expected, atol=1e-3)


@pytest.mark.parametrize("max_iterations", [0, 1])
def test_failure_raises(max_iterations: int) -> None:
    states, goals = pairs(2)
    with pytest.raises(SolverError, match=r"environment 0, step 0.*max_iterations"):
        NMPC(max_iterations=max_iterations).predict(observations(states, goals))


@pytest.mark.parametrize("max_iterations", [0, 1])
def test_failure_is_reported_and_stays_reported(
    max_iterations: int, capfd: pytest.CaptureFixture[str]
) -> None:
    limited = NMPC(max_iterations=max_iterations, on_failure="report")
    states, goals = pairs(2)
    states[:, 3:] = [0.6, 0.3]
    actions, memory = limited.predict(observations(states, goals))
    assert memory.solved.tolist() == [False, False]
    np.testing.assert_allclose(actions, [[-2.0, -1.0]] * 2, rtol=1e-6)  # brakes and straightens
    flags = np.array([True, False])
    able = NMPC(on_failure="report")
    _, following = able.predict(observations(states, goals), memory, episode_start=flags)
    assert following.solved.tolist() == [True, False]
    assert capfd.readouterr().out == ""


def test_only_the_infeasible_environment_is_reported(policy: NMPC) -> None:
    """At 4 m/s just before the end of the corridor no action helps."""
    states, goals = pairs(2)
    states[1] = [7.5, -2.0, 0.0, 4.0, 0.0]
    actions, memory = policy.predict(observations(states, goals))
    assert memory.solved.tolist() == [True, False]
    np.testing.assert_array_equal(actions[1], [-3.0, 0.0])
    drive(policy, states, goals, 3)  # and it goes on


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observation": np.full(5, np.nan)}, "'observation' in .* finite"),
        ({"desired_goal": np.array([np.inf, 0.0])}, "'desired_goal' in .* finite"),
        ({"observation": np.zeros(4)}, r"\(5,\)"),
        ({"desired_goal": np.zeros((3, 2))}, "1 states and 3 goals"),
    ],
)
def test_bad_observation_is_refused(policy: NMPC, change: dict[str, Any], message: str) -> None:
    states, goals = pairs(1)
    with pytest.raises(InputError, match=message):
        policy.predict(observations(states[0], goals[0]) | change)


def test_other_bad_arguments_are_refused(policy: NMPC) -> None:
    states, goals = pairs(2)
    both = observations(states, goals)
    _, memory = policy.predict(both)
    with pytest.raises(InputError, match=r"env.reset\(\)"):
        policy.predict((both, {}))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="desired_goal"):
        policy.predict({"observation": states})
    with pytest.raises(InputError, match=r"state: .* 1 environments"):
        policy.predict(observations(states[0], goals[0]), memory)
    with pytest.raises(InputError, match="state"):
        policy.predict(both, np.zeros(2))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"episode_start: expected shape \(2,\)"):
        policy.predict(both, memory, episode_start=np.array([True]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"horizon": 1}, "horizon"),
        ({"max_iterations": -1}, "max_iterations"),
        ({"on_failure": "rise"}, "Did you mean 'raise'"),
        ({"timing": SpeedProfile(6.0, 1.0)}, "timing: 20.0 m in 6.0 s"),
        ({"parameters": CarUMazeParameters(wheelbase=1.5)}, "turning circle"),
        (
            {
                "parameters": CarUMazeParameters(
                    arm_length=3, separation=8, max_path=14, bend_clearance=2
                )
            },
            "arm_length",
        ),
    ],
)
def test_bad_configuration_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NMPC(**arguments)


@pytest.mark.parametrize("ramp", [0.0, 5.0, float("nan")])
def test_bad_timing_is_refused(ramp: float) -> None:
    with pytest.raises(ConfigError, match="ramp"):
        SpeedProfile(arrival=9.0, ramp=ramp)


def test_missing_casadi_gives_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "casadi", None)
    with pytest.raises(MissingExtraError, match=r"NMPC .* pip install 'mpd-gym\[collect\]'"):
        NMPC()


# Closed loop


@pytest.mark.slow
def test_arrives_without_collision_and_stands_still() -> None:
    """In the environment itself, from 20 seeds; see the class's docstring."""
    policy, env = NMPC(), CarUMazeEnv()
    sides = set()
    for seed in range(20):
        observation, _ = env.reset(seed=seed)
        sides.add(bool(observation["observation"][1] > 0))
        memory: NMPCState | None = None
        for t in range(64):
            action, memory = policy.predict(observation, memory, np.array([t == 0]))
            assert env.action_space.contains(action)
            observation, _, terminated, _, info = env.step(action)
            assert not terminated and not info["collision"]
            error = np.hypot(*(observation["achieved_goal"] - observation["desired_goal"]))
            if t + 1 >= 32:
                assert info["is_success"] and error < 0.05
                assert np.abs(observation["observation"][3:]).max() < 0.05
        assert memory is not None and memory.solved.all()
        assert error < 0.01 and np.abs(observation["observation"][3:]).max() < 1e-3
    assert sides == {True, False}


@pytest.mark.slow
def test_drives_other_cars_and_mazes() -> None:
    parameters = CarUMazeParameters(wheelbase=1.3, separation=5.0, arm_length=10.0, dt=0.2)
    policy = NMPC(parameters)
    states, goals = draw_starts(np.random.default_rng(0).random((4, 6)), parameters)
    memory = None
    for _ in range(48):
        actions, memory = policy.predict(observations(states, goals), memory)
        states = transition(states, actions, parameters)
        assert not collides(states, parameters).any()
    assert np.hypot(*(states[:, :2] - goals).T).max() < 0.05


@pytest.mark.slow
def test_sb3_evaluates_it() -> None:
    evaluation = pytest.importorskip("stable_baselines3.common.evaluation")
    environments = pytest.importorskip("stable_baselines3.common.vec_env")
    from gymnasium.wrappers import TimeLimit
    from stable_baselines3.common.monitor import Monitor

    venv = environments.DummyVecEnv(
        [lambda: Monitor(TimeLimit(CarUMazeEnv(reward_type="sparse"), 40))] * 2
    )
    venv.seed(0)
    rewards, lengths = evaluation.evaluate_policy(
        NMPC(), venv, n_eval_episodes=4, return_episode_rewards=True
    )
    assert lengths == [40] * 4
    assert all(-27 <= reward <= -15 for reward in rewards)  # within 1 m after 26 steps at most
