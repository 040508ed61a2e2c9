"""CarUMaze-v0: starts, steps and pictures; the promises of all environments are in test_envs."""

from __future__ import annotations

import math
import pickle

import gymnasium as gym
import numpy as np
import pytest

from mpd_gym.envs.car_umaze import (
    CarUMazeEnv,
    CarUMazeVectorEnv,
    collides,
    drive,
    path_length,
    transition,
)
from mpd_gym.errors import InputError

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
def test_bad_options_change_nothing(options, message) -> None:
    for make in (CarUMazeEnv, lambda: CarUMazeVectorEnv(1)):
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
    env.reset(seed=0, options={"state": [0.5, 2.0, 0, 0, 0], "goal": [1.5, -2.2]})
    np.testing.assert_array_equal(env.render(), pictured().render())


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
