"""CarUMaze-v0: the mathematics of car and maze, then the promises of the environment."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from scipy.integrate import solve_ivp

from mpd_gym.envs.car_umaze import (
    CarUMazeEnv,
    CarUMazeParameters,
    CarUMazeVectorEnv,
    bicycle_step,
    collides,
    drive,
    footprint,
    inverse_transition,
    path_length,
    transition,
)
from mpd_gym.errors import InputError

PARAMETERS = CarUMazeParameters()


def rates(state: Any, action: Any, wheelbase: float = 1.0) -> np.ndarray:
    _, _, heading, speed, steering = state
    turn = speed * math.tan(steering) / wheelbase
    return np.array([speed * math.cos(heading), speed * math.sin(heading), turn, *action])


def inside(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """States and actions whose step of 0.3 s keeps within the bounds of speed and steering."""
    states = rng.uniform([-5, -5, -4, -0.9, -0.55], [5, 5, 4, 3.9, 0.55], (count, 5))
    low = np.maximum((np.array([-1, -0.6]) - states[:, 3:]) / 0.3, [-3, -1.5])
    high = np.minimum((np.array([4, 0.6]) - states[:, 3:]) / 0.3, [3, 1.5])
    return states, low + rng.uniform(0.01, 0.99, (count, 2)) * (high - low)


def exact(state: np.ndarray, action: np.ndarray) -> np.ndarray:
    solution = solve_ivp(
        lambda _, s: rates(s, action), (0, 0.3), state, method="DOP853", rtol=1e-12, atol=1e-12
    )
    return solution.y[:, -1]


# --- the bicycle ---------------------------------------------------------------------------------


def test_the_inverse_transition_gives_back_the_action() -> None:
    rng = np.random.default_rng(0)
    states = rng.uniform([0, -3, -3, -0.5, -0.3], [8, 3, 3, 1.5, 0.3], (200, 5))
    actions = rng.uniform([-3, -1.5], [3, 1.5], (200, 2))
    after = transition(states, actions)
    inside = (np.abs(after[:, 4]) < 0.6) & (after[:, 3] > -1) & (after[:, 3] < 3)
    assert inside.mean() > 0.5
    found = inverse_transition(states, after)
    np.testing.assert_allclose(found[inside], actions[inside], atol=1e-9)
    far = inverse_transition(states, after + np.array([0, 0, 0, 9.0, -9.0]))
    np.testing.assert_array_equal(far, np.tile([3.0, -1.5], (200, 1)))


def test_transition_solves_the_differential_equation() -> None:
    states, actions = inside(np.random.default_rng(0), 60)
    expected = np.array([exact(s, a) for s, a in zip(states, actions, strict=True)])
    np.testing.assert_allclose(transition(states, actions), expected, rtol=0, atol=5e-5)
    np.testing.assert_allclose(
        transition(states, actions, replace(PARAMETERS, substeps=60)), expected, rtol=0, atol=1e-9
    )


def test_integration_is_of_fourth_order() -> None:
    states, actions = inside(np.random.default_rng(1), 20)
    expected = np.array([exact(s, a) for s, a in zip(states, actions, strict=True)])
    counts = np.array([2, 4, 8, 16])
    errors = [
        np.abs(transition(states, actions, replace(PARAMETERS, substeps=int(n))) - expected).max()
        for n in counts
    ]
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -4.3 < slope < -3.7


def test_substep_is_textbook_runge_kutta() -> None:
    states, actions = inside(np.random.default_rng(2), 50)
    for state, action in zip(states, actions, strict=True):
        k1 = rates(state, action)
        k2 = rates(state + 0.05 * k1, action)
        k3 = rates(state + 0.05 * k2, action)
        k4 = rates(state + 0.1 * k3, action)
        expected = state + 0.1 / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        np.testing.assert_allclose(bicycle_step(state, action), expected, rtol=0, atol=1e-13)


def test_bounds_act_only_outside() -> None:
    states, actions = inside(np.random.default_rng(3), 200)
    for state, action in zip(states, actions, strict=True):
        assert bicycle_step(state, action) == bicycle_step(state, action, bounded=False)
    assert bicycle_step((0, 0, 0, 3.9, 0), (3, 0), bounded=False)[3] == pytest.approx(4.2)


def test_at_its_bounds_the_car_drives_on_steadily() -> None:
    fast = np.array([0.0, 0.0, 0.3, 4.0, 0.6])
    pushed = transition(fast, np.array([3.0, 1.5]))
    np.testing.assert_array_equal(pushed, transition(fast, np.zeros(2)))
    np.testing.assert_allclose(pushed, exact(fast, np.zeros(2)), rtol=0, atol=1e-5)
    back = np.array([0.0, 0.0, 0.3, -1.0, -0.6])
    np.testing.assert_array_equal(
        transition(back, np.array([-3.0, -1.5])), transition(back, np.zeros(2))
    )


def test_bounds_hold_from_any_state_within_them() -> None:
    rng = np.random.default_rng(4)
    states = rng.uniform([0, 0, -9, -1, -0.6], [0, 0, 9, 4, 0.6], (2000, 5))
    after = transition(states, rng.uniform(-9, 9, (2000, 2)))
    assert (after[:, 3] >= -1).all() and (after[:, 3] <= 4).all()
    assert (np.abs(after[:, 4]) <= 0.6).all()
    assert (after[:, 3] == 4).any() and (after[:, 3] == -1).any()


def test_actions_are_clipped_on_a_copy_and_broadcast() -> None:
    states = np.random.default_rng(5).uniform(-0.5, 0.5, (3, 4, 5))
    wild, kept = np.array([50.0, -9.0]), states.copy()
    after = transition(states, wild)
    assert after.shape == (3, 4, 5)
    np.testing.assert_array_equal(after, transition(states, np.tile([3.0, -1.5], (3, 4, 1))))
    np.testing.assert_array_equal(after[1, 2], transition(states[1, 2], wild))
    assert (wild == [50.0, -9.0]).all() and (states == kept).all()


def test_heading_is_not_wrapped() -> None:
    state = np.array([0.0, 0.0, 0.0, 3.0, 0.6])
    headings = [state[2]]
    for _ in range(20):
        state = transition(state, np.zeros(2))
        headings.append(state[2])
    assert headings[-1] > 2 * math.pi and (np.diff(headings) > 0).all()


def test_floats_arrays_and_casadi_agree() -> None:
    casadi = pytest.importorskip("casadi")
    x, u = casadi.SX.sym("x", 5), casadi.SX.sym("u", 2)
    last = drive(casadi.vertsplit(x), casadi.vertsplit(u), functions=casadi)[-1]
    symbolic = casadi.Function("step", [x, u], [casadi.vertcat(*last)])
    rng = np.random.default_rng(6)
    states = rng.uniform([-5, -5, -9, -1, -0.6], [5, 5, 9, 4, 0.6], (300, 5))
    actions = rng.uniform(-4, 4, (300, 2))
    arrays = transition(states, actions)
    for state, action, expected in zip(states, actions, arrays, strict=True):
        floats = drive(state.tolist(), action.tolist(), functions=math)[-1]
        assert all(type(value) is float for value in floats)
        np.testing.assert_allclose(floats, expected, rtol=0, atol=1e-12)
        stepped = symbolic(state, action).full().ravel()
        np.testing.assert_allclose(stepped, expected, rtol=0, atol=1e-12)


# --- the maze ------------------------------------------------------------------------------------


def in_wall(points: np.ndarray) -> np.ndarray:
    x, y = points[..., 0], points[..., 1]
    inner = (x <= 6.5) & (np.abs(y) <= 0.5)
    return inner | (x <= -1.5) | (x >= 9.5) | (np.abs(y) >= 3.5)


def test_footprint() -> None:
    corners = footprint(np.array([1.0, 2.0, np.pi / 2, 0.0, 0.0]))
    expected = [[0.65, 3.2], [1.35, 3.2], [1.35, 1.8], [0.65, 1.8]]
    np.testing.assert_allclose(corners, expected, atol=1e-12)
    states = np.random.default_rng(0).uniform(-3, 3, (6, 2, 5))
    assert footprint(states).shape == (6, 2, 4, 2)
    np.testing.assert_array_equal(footprint(states)[3, 1], footprint(states[3, 1]))


def test_collisions_against_sampled_points() -> None:
    """A grid of 0.02 m finds every overlap of a car that is smaller by 0.05 m on each side."""
    rng = np.random.default_rng(1)
    poses = rng.uniform([-1, -3.2, -7], [9.3, 3.2, 7], (4000, 3))
    along, across = np.linspace(-0.2, 1.2, 71), np.linspace(-0.35, 0.35, 36)
    offsets = np.stack(np.meshgrid(along, across), axis=-1).reshape(-1, 2)
    cos, sin = np.cos(poses[:, 2, None]), np.sin(poses[:, 2, None])
    points = poses[:, None, :2] + np.stack(
        [cos * offsets[:, 0] - sin * offsets[:, 1], sin * offsets[:, 0] + cos * offsets[:, 1]], -1
    )
    sampled = in_wall(points).any(axis=1)
    smaller = replace(PARAMETERS, front=1.15, rear=0.15, width=0.6)
    found = collides(poses)
    assert found[sampled].all()
    assert sampled[collides(poses, smaller)].all()
    assert 0.2 < found.mean() < 0.8 and (found == sampled).mean() > 0.99


def test_wall_corner_in_the_cars_side_is_found() -> None:
    """No corner of the car is in a wall, but the wall's corner is in the car."""
    pose = np.array([6.2, 1.0, -math.pi / 4])
    assert not in_wall(footprint(pose)).any()
    assert collides(pose)
    assert not collides(pose + np.array([0.4, 0.4, 0.0]))


def test_touching_counts() -> None:
    assert collides(np.array([0.0, 3.15, 0.0])) and not collides(np.array([0.0, 3.1499, 0.0]))
    assert collides(np.array([0.0, 0.85, 0.0])) and not collides(np.array([0.0, 0.8501, 0.0]))
    assert collides(np.zeros((3, 2, 5))).shape == (3, 2)


def test_path_length() -> None:
    assert path_length(np.array([0.0, 2.0]), np.array([0.0, -2.0])) == 20
    assert path_length(np.array([3.0, -2.4]), np.array([5.0, 1.6])) == 5 + 4 + 3
    assert path_length(np.array([3.0, 2.1]), np.array([5.0, 1.9])) == 2
    assert path_length(np.array([8.3, 0.5]), np.array([-1.0, -2.0])) == 2.5 + 8
    many = np.random.default_rng(0).uniform(-1, 8, (4, 3, 2))
    np.testing.assert_array_equal(
        path_length(many, many[0, 0])[2, 1], path_length(many[2, 1], many[0, 0])
    )


# --- starts --------------------------------------------------------------------------------------


def test_starts_are_as_described() -> None:
    count = 6000
    observations, infos = CarUMazeVectorEnv(count).reset(seed=0)
    states, goals = observations["observation"], observations["desired_goal"]
    upper = states[:, 1] > 0
    sign = np.where(upper, 1, -1)
    assert 0.47 < upper.mean() < 0.53
    assert (states[:, 3:] == 0).all()
    for y, x in ((states[:, 1] * sign, states[:, 0]), (-goals[:, 1] * sign, goals[:, 0])):
        assert y.min() >= 1.5 and y.max() <= 2.5 and np.ptp(y) > 0.98
        assert x.min() >= -1e-12 and x.max() <= 6 and np.ptp(x) > 5.8
    assert np.abs(states[:, 2]).max() <= 0.1 and np.ptp(states[:, 2]) > 0.19
    lengths = path_length(states[:, :2], goals)
    assert lengths.min() >= 12 - 1e-9 and lengths.max() <= 20 + 1e-9
    np.testing.assert_allclose(np.quantile(lengths, [0.25, 0.5, 0.75]), [14, 16, 18], atol=0.25)
    assert not collides(states).any()
    assert not infos["is_success"].any() and not infos["collision"].any()


def test_every_start_can_turn_into_the_bend() -> None:
    """From the start nearest to the bend, full lock at low speed leads round without a touch."""
    state = np.array([6.0, 2.0, 0.0, 0.0, 0.0])
    for step in range(20):
        state = transition(state, np.array([1.0 if step < 3 else 0.0, -1.5 if step > 0 else 0.0]))
        if state[2] < -math.pi / 2:
            break
        assert not collides(state)
    assert state[2] < -math.pi / 2


def test_exact_starts() -> None:
    env = CarUMazeEnv()
    options = {"state": [1.0, -2.2, 0.3, 1.5, -0.2], "goal": (4.0, 2.5)}
    observation, _ = env.reset(seed=0, options=options)
    np.testing.assert_array_equal(observation["observation"], options["state"])
    np.testing.assert_array_equal(observation["desired_goal"], options["goal"])
    np.testing.assert_array_equal(env.state, options["state"])
    for seed in range(20):
        observation, _ = env.reset(seed=seed, options={"state": options["state"]})
        assert observation["desired_goal"][1] > 0
        observation, _ = env.reset(seed=seed, options={"goal": [2.0, -2.0]})
        assert observation["observation"][1] > 0
        np.testing.assert_array_equal(observation["desired_goal"], [2.0, -2.0])
    batch, _ = CarUMazeVectorEnv(3).reset(seed=0, options=options)
    np.testing.assert_array_equal(batch["observation"], np.tile(options["state"], (3, 1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": [0, 2]}, "options: expected keys among .*goal.*state.*start"),
        ({"state": [0, 2, 0, 0]}, r"options\['state'\]: expected shape \(5,\), got \(4,\)"),
        ({"state": [0, np.nan, 0, 0, 0]}, r"options\['state'\]: expected finite"),
        ({"state": [0, 2, 0, 4.5, 0]}, "speed"),
        ({"state": [0, 2, 0, 0, 0.7]}, "steering"),
        ({"state": [0, 0, 0, 0, 0]}, "touches a wall"),
        ({"goal": [0, 0]}, r"options\['goal'\]: expected a point in a corridor"),
        ({"goal": [20, 0]}, "corridor"),
        ({"goal": "there"}, r"options\['goal'\]"),
    ],
)
@pytest.mark.parametrize("make", [CarUMazeEnv, lambda: CarUMazeVectorEnv(1)])
def test_bad_options_change_nothing(make, options, message) -> None:
    env, twin = make(), make()
    env.reset(seed=3), twin.reset(seed=3)
    with pytest.raises(InputError, match=message):
        env.reset(seed=8, options=options)
    np.testing.assert_array_equal(env.reset()[0]["observation"], twin.reset()[0]["observation"])


# --- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward_type", ["sparse", "dense"])
def test_steps_keep_their_promises(reward_type) -> None:
    env = gym.wrappers.TimeLimit(CarUMazeEnv(reward_type=reward_type), 64)
    env.action_space.seed(0)
    ends = successes = 0
    for seed in range(40):
        before, info = env.reset(seed=seed)
        assert info == {"is_success": False, "collision": False}
        terminated = truncated = False
        while not (terminated or truncated):
            action = env.action_space.sample()
            kept = action.copy()
            after, reward, terminated, truncated, info = env.step(action)
            assert (action == kept).all() and env.observation_space.contains(after)
            expected = transition(before["observation"], action)
            np.testing.assert_allclose(after["observation"], expected, rtol=0, atol=1e-12)
            np.testing.assert_array_equal(after["achieved_goal"], after["observation"][:2])
            assert type(reward) is float and type(terminated) is bool
            assert {type(value) for value in info.values()} == {bool}
            goals = after["achieved_goal"], after["desired_goal"]
            assert reward == env.unwrapped.compute_reward(*goals, info)
            distance = np.linalg.norm(goals[0] - goals[1])
            assert reward == pytest.approx(
                -distance if reward_type == "dense" else -1.0 * (distance >= 1)
            )
            assert info["is_success"] == (distance < 1)
            path = drive(before["observation"], action.astype(float))
            assert terminated == info["collision"] == collides(np.array(path)).any()
            before = after
            successes += info["is_success"]
        ends += terminated
    assert 0 < ends < 40


def test_reaching_the_goal_ends_nothing() -> None:
    env = CarUMazeEnv()
    env.reset(options={"state": [1.0, 2.0, 0, 0, 0], "goal": [2.0, 2.0]})
    _, reward, terminated, truncated, info = env.step([0.0, 0.0])
    assert (reward, terminated, truncated) == (-1.0, False, False)
    assert info == {"is_success": False, "collision": False}, "a distance of 1 m is not yet enough"
    _, reward, terminated, truncated, info = env.step([1.0, 0.0])
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info == {"is_success": True, "collision": False}


def test_corners_cut_between_steps_are_found() -> None:
    """Cars that touch the wall's corner in a substep and are clear of it at the step's end."""
    rng = np.random.default_rng(0)
    states = rng.uniform([6.0, 0.6, -2.2, 3, -0.6], [7.2, 1.8, -0.8, 4, 0.6], (20000, 5))
    actions = rng.uniform([-3, -1.5], [3, 1.5], (20000, 2))
    after = transition(states, actions)
    path = np.stack([np.stack(s, -1) for s in drive(states.T, actions.T)], 1)
    cut = ~collides(states) & collides(path).any(axis=1) & ~collides(after)
    assert cut.sum() > 5
    env = CarUMazeEnv()
    for index in np.flatnonzero(cut)[:5]:
        env.reset(options={"state": states[index], "goal": [1.0, -2.0]})
        *_, terminated, _, info = env.step(actions[index])
        assert terminated and info["collision"]


def test_compute_reward_is_vectorised() -> None:
    rng = np.random.default_rng(0)
    achieved, desired = rng.uniform(0, 2, (2, 4, 3, 2))
    distance = np.linalg.norm(achieved - desired, axis=-1)
    dense = CarUMazeEnv(reward_type="dense").compute_reward(achieved, desired, [{}] * 4)
    sparse = CarUMazeEnv().compute_reward(achieved, desired, None)
    np.testing.assert_allclose(dense, -distance, rtol=1e-14)
    np.testing.assert_array_equal(sparse, np.where(distance < 1, 0.0, -1.0))
    assert dense.dtype == sparse.dtype == np.float64 and set(np.unique(sparse)) == {-1.0, 0.0}
    assert CarUMazeEnv().compute_reward(np.zeros(2), np.array([1.0, 0.0]), {}) == -1
    with pytest.raises(InputError, match="desired_goal"):
        CarUMazeEnv().compute_reward(np.zeros(2), np.zeros(3), {})


@pytest.mark.parametrize("action", [[0.0], [[0.0, 0.0]], [np.nan, 0.0], [0.0, np.inf], "left"])
def test_bad_actions_change_nothing(action) -> None:
    env = CarUMazeEnv()
    env.reset(seed=0)
    before = env.state
    with pytest.raises(InputError, match="action: expected"):
        env.step(action)
    np.testing.assert_array_equal(env.state, before)


def test_reset_is_needed() -> None:
    for use in (CarUMazeEnv.render, lambda env: env.step([0, 0]), lambda env: env.state):
        with pytest.raises(ResetNeeded):
            use(CarUMazeEnv(render_mode="rgb_array"))


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"wheelbase": 0.0}, "wheelbase: expected > 0"),
        ({"dt": math.nan}, "dt: expected finite"),
        ({"width": "wide"}, "width: expected numbers"),
        ({"substeps": 2.5}, "substeps must be an integer"),
        ({"min_speed": 0.5}, "min_speed must be at most 0, got 0.5"),
        ({"max_steering": 1.6}, "max_steering must be below"),
        ({"separation": 3.0}, "separation must exceed twice half_width"),
        ({"max_path": 21.0}, "min_path <= max_path must lie within 8.0 … 20.0 m.* 21.0"),
        ({"bend_clearance": 9.0, "min_path": 20.0}, "bend_clearance must not exceed arm_length"),
        ({"lateral_offset": 1.2}, "wide enough"),
        ({"reward_type": "spare"}, "reward_type must be 'sparse' or 'dense', got 'spare'"),
    ],
)
def test_constants_are_checked(constants, message) -> None:
    for make in (CarUMazeEnv, lambda **kwargs: CarUMazeVectorEnv(2, **kwargs)):
        with pytest.raises(InputError, match=message):
            make(**constants)


def test_constants_act() -> None:
    env = CarUMazeEnv(max_acceleration=1.0, dt=0.5, substeps=5, max_speed=0.4, success_radius=3.0)
    env.reset(options={"state": [0, 2, 0, 0, 0], "goal": [2.5, 2]})
    observation, _, _, _, info = env.step([9.0, 0.0])
    assert observation["observation"][3] == pytest.approx(0.4) and info["is_success"]
    assert env.action_space.high[0] == 1 and env.observation_space["observation"].high[3] == 0.4


def test_nothing_leaks_between_episodes() -> None:
    used, fresh = CarUMazeEnv(), CarUMazeEnv()
    used.reset(seed=1)
    for _ in range(30):
        used.step([2.0, 0.5])
    np.testing.assert_array_equal(
        used.reset(seed=2)[0]["observation"], fresh.reset(seed=2)[0]["observation"]
    )
    for actual, expected in zip(used.step([1.0, 0.1]), fresh.step([1.0, 0.1]), strict=True):
        np.testing.assert_equal(actual, expected)


# --- pictures ------------------------------------------------------------------------------------


def pictured(steps: int = 0) -> CarUMazeEnv:
    env = CarUMazeEnv(render_mode="rgb_array")
    env.reset(seed=0, options={"state": [0.5, 2.0, 0, 0, 0], "goal": [1.5, -2.2]})
    for _ in range(steps):
        env.step([1.0, 0.0])
    return env


def test_picture_shows_what_happens() -> None:
    env = pictured()
    first = env.render()
    assert first.shape == (512, 768, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, env.render())
    env.step([3.0, -1.0])
    second = env.render()
    assert (first != second).any(axis=-1).sum() > 500
    blue = (second.astype(int) - second[..., :1])[..., 2] > 100
    rows, columns = np.nonzero(blue)
    x, y = env.state[:2]
    assert abs(columns.mean() - ((x + 0.5 - 4) * 64 + 384)) < 25
    assert abs(rows.mean() - (256 - y * 64)) < 15
    env.close(), env.close()


def test_plans_are_drawn_and_cleared() -> None:
    env = pictured(3)
    plain = env.render()
    plan = np.column_stack([np.linspace(1.5, 6, 12), np.full(12, 2.0)])
    env.draw_plan(plan)
    single = env.render()
    orange = (single.astype(int)[..., 0] - single[..., 2]) > 150
    rows, columns = np.nonzero(orange)
    assert orange.sum() > 500 and abs(rows.mean() - 128) < 3 and columns.max() > 500
    fan = np.stack([plan + np.array([0, shift]) for shift in (-0.8, 0, 0.8)])
    env.draw_plan(np.concatenate([fan, np.zeros((3, 12, 3))], axis=-1), chosen=1)
    many = env.render()
    assert (many != single).any(axis=-1).sum() > 300
    env.draw_plan(fan, chosen=2)
    assert (env.render() != many).any()
    env.draw_plan(None)
    np.testing.assert_array_equal(env.render(), plain)
    env.draw_plan(np.full((4, 2), np.nan))
    np.testing.assert_array_equal(env.render(), plain)
    env.draw_plan(plan)
    env.reset(seed=0)
    assert env._scene.plans is None


@pytest.mark.parametrize(
    ("plans", "chosen", "message"),
    [(np.zeros(3), 0, "plans"), (np.zeros((4, 1)), 0, "plans"), (np.zeros((2, 4, 2)), 2, "chosen")],
)
def test_plans_are_checked(plans, chosen, message) -> None:
    with pytest.raises(InputError, match=message):
        pictured().draw_plan(plans, chosen)


def test_collision_shows() -> None:
    env = pictured()
    env.reset(options={"state": [6.5, 2.0, 0, 4, 0], "goal": [1, -2]})
    while not env.step([3.0, 0.0])[2]:
        pass
    picture = env.render().astype(int)
    assert ((picture[..., 0] - picture[..., 2]) > 150).sum() > 500


def test_pickled_copy_goes_on_alike() -> None:
    env = pictured(4)
    env.render()
    twin = pickle.loads(pickle.dumps(env))
    for _ in range(3):
        for actual, expected in zip(env.step([1.0, 0.2]), twin.step([1.0, 0.2]), strict=True):
            np.testing.assert_equal(actual, expected)
    np.testing.assert_array_equal(env.render(), twin.render())
    np.testing.assert_array_equal(env.reset()[0]["observation"], twin.reset()[0]["observation"])


def test_window_opens_and_closes() -> None:
    import pygame

    env = CarUMazeEnv(render_mode="human")
    env.reset(seed=0)
    assert pygame.display.get_surface().get_size() == (768, 512)
    env.step([1.0, 0.0])
    assert env.render() is None
    twin = pickle.loads(pickle.dumps(env))
    env.close()
    assert not pygame.display.get_init()
    env.close(), twin.close()


def test_render_modes_are_checked() -> None:
    with pytest.raises(InputError, match=r"render_mode: .*rgb_array.*'ansi'"):
        CarUMazeEnv(render_mode="ansi")


def test_importing_loads_neither_pygame_nor_torch() -> None:
    code = (
        "import sys, mpd_gym.envs.car_umaze; "
        "print(sorted({'pygame', 'torch', 'casadi', 'mujoco'} & set(sys.modules)))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "[]"
