"""The mathematics of the car and the maze of CarUMaze-v0."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from mpd_gym.envs.car_umaze import (
    CarUMazeParameters,
    bicycle_step,
    collides,
    drive,
    footprint,
    inverse_transition,
    path_length,
    transition,
)

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
