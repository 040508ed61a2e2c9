"""LQR-v0: exact discretisation, quadratic rewards, and the optimum by Riccati's equation."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm, solve_discrete_lyapunov

import mpd_gym  # noqa: F401  (registers the ids)
from mpd_gym.envs.lqr import (
    LinearQuadraticProblem,
    LQREnv,
    LQRVectorEnv,
    double_integrator,
    reward,
    transition,
)
from mpd_gym.errors import InputError


def random_problem(seed: int, states: int, actions: int) -> LinearQuadraticProblem:
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(states, states))
    efforts = rng.normal(size=(actions, actions))
    dynamics = rng.normal(size=(states, states))
    return LinearQuadraticProblem(
        A=1.1 * dynamics / np.abs(np.linalg.eigvals(dynamics)).max(),  # just unstable
        B=rng.normal(size=(states, actions)),
        Q=weights @ weights.T + 0.1 * np.eye(states),
        R=efforts @ efforts.T + 0.1 * np.eye(actions),
    )


problems = st.builds(random_problem, st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 3))


@pytest.mark.parametrize("dt", [0.1, 0.7])
def test_the_double_integrator_is_discretised_exactly(dt: float) -> None:
    continuous = np.zeros((3, 3))  # (position, velocity, force) with the force held
    continuous[0, 1] = continuous[1, 2] = 1.0
    exact = expm(dt * continuous)
    A, B = double_integrator(dt)
    np.testing.assert_allclose(np.hstack([A, B]), exact[:2], atol=1e-15)


def test_default_problem_is_the_papers() -> None:
    problem = LQREnv().problem
    A, B = double_integrator(0.1)
    assert np.array_equal(problem.A, A) and np.array_equal(problem.B, B)
    assert np.array_equal(problem.Q, np.eye(2)) and np.array_equal(problem.R, [[0.1]])


@given(problems, st.integers(0, 100))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_transition_and_reward_are_their_formulas_for_any_batch(
    problem: LinearQuadraticProblem, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(3, 2, len(problem.A)))
    actions = rng.normal(size=(3, 2, problem.B.shape[1]))
    moved = transition(states, actions, problem.A, problem.B)
    gained = reward(states, actions, problem.Q, problem.R)
    assert gained.shape == (3, 2)
    for index in np.ndindex(3, 2):
        x, u = states[index], actions[index]
        np.testing.assert_allclose(moved[index], problem.A @ x + problem.B @ u, atol=1e-12)
        assert gained[index] == pytest.approx(-(x @ problem.Q @ x + u @ problem.R @ u), rel=1e-12)
        # one state gives the bits that a batch gives
        assert np.array_equal(moved[index], transition(x, u, problem.A, problem.B))
        assert gained[index] == reward(x, u, problem.Q, problem.R)


@given(problems, st.integers(0, 100))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_gain_is_stabilising_and_its_cost_is_the_optimum(
    problem: LinearQuadraticProblem, seed: int
) -> None:
    closed = problem.A + problem.B @ problem.gain
    assert np.abs(np.linalg.eigvals(closed)).max() < 1
    stage = problem.Q + problem.gain.T @ problem.R @ problem.gain
    summed = solve_discrete_lyapunov(closed.T, stage)  # Σ cost of u = Kx, not by Riccati
    x = np.random.default_rng(seed).normal(size=(5, len(problem.A)))
    expected = np.einsum("ni,ij,nj->n", x, summed, x)
    np.testing.assert_allclose(problem.cost(x), expected, rtol=1e-6)
    # Bellman: any other first action, then the optimum, costs more
    other = x @ problem.gain.T + 0.1
    worse = -reward(x, other, problem.Q, problem.R)
    worse = worse + problem.cost(transition(x, other, problem.A, problem.B))
    assert (worse > problem.cost(x)).all()


def test_the_optimal_controllers_return_is_minus_the_optimal_cost() -> None:
    env = gym.make("LQR-v0")
    for seed in range(5):
        start, _ = env.reset(seed=seed)
        x, total, truncated = start, 0.0, False
        while not truncated:
            x, gained, terminated, truncated, _ = env.step(env.unwrapped.optimal_gain @ x)
            assert not terminated
            total += gained
        assert -total == pytest.approx(float(env.unwrapped.optimal_cost(start)), rel=1e-9)


def test_reward_is_that_of_the_state_before_the_step() -> None:
    env = LQREnv(Q=np.diag([2.0, 3.0]), R=[[0.5]])
    env.reset(options={"state": [1.0, -2.0]})
    observation, gained, *_ = env.step([4.0])
    assert gained == pytest.approx(-(2 * 1 + 3 * 4 + 0.5 * 16))
    np.testing.assert_allclose(observation, [1 - 0.2 + 0.005 * 4, -2 + 0.4])


def test_noisy_experts_cost_four_times_the_optimum() -> None:
    """The reason for the small starts; paper: MPDiffuser, appendix E, p = 0.4."""
    env = gym.make_vec("LQR-v0", num_envs=500)
    assert isinstance(env, LQRVectorEnv)
    x, _ = env.reset(seed=0)
    optimum = env.problem.cost(x)
    rng = np.random.default_rng(0)
    cost = np.zeros(500)
    for _ in range(200):
        noise = (rng.random((500, 1)) < 0.4) * rng.normal(0, 0.25, (500, 1))
        x, gained, *_ = env.step(x @ env.problem.gain.T + noise)
        cost -= gained
    assert 3.5 < cost.mean() / optimum.mean() < 4.8


def test_starts_are_uniform_in_their_range() -> None:
    env = gym.make_vec("LQR-v0", num_envs=4000)
    starts, _ = env.reset(seed=0)
    assert (np.abs(starts) <= 0.2).all()
    np.testing.assert_allclose(starts.mean(0), 0.0, atol=0.01)
    np.testing.assert_allclose(starts.var(0), 0.4**2 / 12, rtol=0.06)
    env = gym.make_vec("LQR-v0", num_envs=500, start_range=([1.0, -3.0], [2.0, -3.0]))
    starts, _ = env.reset(seed=0)
    assert (starts[:, 1] == -3.0).all()
    assert (starts[:, 0] >= 1).all() and (starts[:, 0] <= 2).all() and np.ptp(starts[:, 0]) > 0.9


def test_the_start_can_be_given_exactly() -> None:
    env = LQREnv()
    state = np.array([0.1 + 1e-17, -123.456])
    observation, _ = env.reset(seed=1, options={"state": state})
    assert np.array_equal(observation, state)
    observation[:] = 0.0  # a copy
    assert np.array_equal(env.state, state)
    batch, _ = LQRVectorEnv(3).reset(options={"state": state})
    assert np.array_equal(batch, [state] * 3)
    for wrong in ([1.0], [np.nan, 0.0], "here"):
        with pytest.raises(InputError, match=r"options\['state'\]"):
            env.reset(options={"state": wrong})


def test_actions_are_clipped_to_the_box() -> None:
    env = LQREnv(max_action=2.0)
    env.reset(options={"state": [0.0, 0.0]})
    observation, gained, *_ = env.step([-50.0])
    np.testing.assert_allclose(observation, [0.005 * -2, 0.1 * -2])
    assert gained == pytest.approx(-0.1 * 4)


def test_any_system_by_keyword_single_and_batched() -> None:
    problem = random_problem(3, 3, 2)
    keywords: dict[str, Any] = {
        "A": (0.8 * problem.A).tolist(),
        "B": problem.B.tolist(),
        "Q": problem.Q.tolist(),
        "R": problem.R.tolist(),
        "start_range": (-1.0, [1.0, 2.0, 3.0]),
        "max_action": [5.0, 6.0],
    }
    single = gym.make_vec("LQR-v0", num_envs=3, vectorization_mode="sync", **keywords)
    batched = gym.make_vec("LQR-v0", num_envs=3, **keywords)
    np.testing.assert_array_equal(single.reset(seed=0)[0], batched.reset(seed=0)[0])
    for _ in range(30):
        actions = batched.action_space.sample()
        for ours, theirs in zip(batched.step(actions), single.step(actions), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    env = gym.make("LQR-v0", render_mode="rgb_array", **keywords)
    env.reset(seed=0)
    env.step(env.action_space.sample())
    assert env.render().shape == (500, 500, 3)
    env.close()


@pytest.mark.parametrize(
    ("keywords", "word"),
    [
        ({"A": np.eye(3)}, "A"),
        ({"A": [1.0, 2.0]}, "A"),
        ({"B": np.ones((3, 1))}, "A"),
        ({"A": [[1.0, np.nan], [0.0, 1.0]]}, "A"),
        ({"A": [[1.0], [0.0, 1.0]]}, "A"),
        ({"Q": np.eye(3)}, "Q"),
        ({"Q": [[1.0, 0.5], [0.0, 1.0]]}, "Q.*symmetric"),
        ({"Q": np.diag([1.0, -1.0])}, "Q.*semidefinite"),
        ({"R": [[0.0]]}, "R.*definite"),
        ({"R": np.eye(2)}, "R"),
        ({"start_range": 0.2}, "start_range"),
        ({"start_range": (0.2, -0.2)}, "start_range"),
        ({"start_range": ([0.0, 0.0, 0.0], 1.0)}, "start_range"),
        ({"max_action": 0.0}, "max_action"),
        ({"max_action": np.inf}, "max_action"),
    ],
)
def test_wrong_systems_are_refused(keywords: dict[str, Any], word: str) -> None:
    for make in (LQREnv, lambda **system: LQRVectorEnv(2, **system)):
        with pytest.raises(InputError, match=f"^{word}"):
            make(**keywords)


def test_a_system_without_a_stabilising_controller_runs_but_has_no_optimum() -> None:
    env = LQREnv(A=np.diag([1.2, 0.5]), B=[[0.0], [1.0]])
    env.reset(seed=0)
    env.step([1.0])
    with pytest.raises(InputError, match="stabilising"):
        _ = env.optimal_gain


def test_semidefinite_costs_are_allowed() -> None:
    env = LQREnv(Q=np.diag([1.0, 0.0]))
    assert np.abs(np.linalg.eigvals(env.problem.A + env.problem.B @ env.optimal_gain)).max() < 1


def test_the_problem_cannot_be_changed() -> None:
    A = np.eye(2)
    problem = LQREnv(A=A).problem
    A[0, 0] = 5.0
    assert problem.A[0, 0] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        problem.A[0, 0] = 5.0


def test_scipy_is_loaded_only_for_the_optimum() -> None:
    code = (
        "import sys, gymnasium, mpd_gym; env = gymnasium.make('LQR-v0'); env.reset();"
        "print('scipy' in sys.modules); env.unwrapped.optimal_gain; print('scipy' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True"]
