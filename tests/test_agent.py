"""What `MPDiffuserAgent` promises: predict, plan, options, budgets, files."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import TINY, play, source, tiny_agent
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from mpd_gym import MPDiffuserAgent, MPDiffuserConfig
from mpd_gym.agents.presets import preset
from mpd_gym.datasets import ConditionSpec, load_episodes
from mpd_gym.diffusion import LossConfig
from mpd_gym.envs.wrappers import RemainingBudget
from mpd_gym.errors import CheckpointError, ConfigError, InputError, PlanningError
from mpd_gym.models import UnetConfig
from mpd_gym.training import TrainingConfig

PENDULUM = "ConstrainedPendulum-v0"


@pytest.fixture(scope="module")
def lqr() -> MPDiffuserAgent:
    return tiny_agent("LQR-v0", conditions=("return",), reward_model=True)


@pytest.fixture(scope="module")
def pendulum() -> MPDiffuserAgent:
    models = {"reward_model": True, "cost_model": True, "termination_model": True}
    return tiny_agent(PENDULUM, conditions=("return", "cost"), **models)


@pytest.fixture(scope="module")
def car() -> MPDiffuserAgent:
    return tiny_agent("CarUMaze-v0", conditions=("goal",))


@pytest.fixture(params=["lqr", "pendulum", "car"])
def agent(request: pytest.FixtureRequest) -> MPDiffuserAgent:
    found: MPDiffuserAgent = request.getfixturevalue(request.param)
    return found


def observations(agent: MPDiffuserAgent, count: int) -> Any:
    agent.observation_space.seed(0)
    env = gym.make({3: PENDULUM, 2: "LQR-v0", 5: "CarUMaze-v0"}[agent._nx])
    rows = [env.reset(seed=seed)[0] for seed in range(count)]
    env.close()
    return stacked(rows)


def stacked(rows: list[Any]) -> Any:
    if isinstance(rows[0], dict):
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    return np.stack(rows)


def pick(batch: Any, index: Any) -> Any:
    if isinstance(batch, dict):
        return {key: rows[index] for key, rows in batch.items()}
    return batch[index]


# --- predict ---------------------------------------------------------------------------------


def test_action_is_inside_the_box_with_its_shape_and_type(agent: MPDiffuserAgent) -> None:
    batch = observations(agent, 3)
    actions, state = agent.predict(batch)
    action, _ = agent.predict(pick(batch, 0))
    assert actions.shape == (3, *agent.action_space.shape)
    assert action.shape == agent.action_space.shape
    assert all(agent.action_space.contains(row) for row in [action, *actions])
    assert len(state) == 3


def test_batched_equals_single_when_deterministic(agent: MPDiffuserAgent) -> None:
    many = agent.with_options(num_candidates=3, action_chunk=2, warm_start_steps=3)
    batch = observations(many, 4)
    together, state = many.predict(batch, deterministic=True)
    alone = [many.predict(pick(batch, row), deterministic=True) for row in range(4)]
    np.testing.assert_allclose(together, [action for action, _ in alone], atol=1e-5)
    for _ in range(4):  # through chunks and warm starts
        together, state = many.predict(batch, state, np.zeros(4, bool), True)
        alone = [
            many.predict(pick(batch, row), alone[row][1], np.zeros(1, bool), True)
            for row in range(4)
        ]
        np.testing.assert_allclose(together, [action for action, _ in alone], atol=1e-5)


def test_equal_observations_give_equal_deterministic_actions(agent: MPDiffuserAgent) -> None:
    one = pick(observations(agent, 1), 0)
    same = stacked([one] * 3)
    actions, _ = agent.predict(same, deterministic=True)
    again, _ = agent.predict(one, deterministic=True)
    np.testing.assert_allclose(actions, np.broadcast_to(again, actions.shape), atol=1e-5)


def test_a_candidate_is_the_mean_of_its_samples(agent: MPDiffuserAgent) -> None:
    one = pick(observations(agent, 1), 0)
    samples = agent.with_options(num_candidates=6).plan(one, deterministic=True)
    means = agent.with_options(num_candidates=2, samples_per_candidate=3)
    plan = means.plan(one, deterministic=True)
    expected = samples.observations.reshape(2, 3, *samples.observations.shape[1:]).mean(axis=1)
    np.testing.assert_allclose(plan.observations, expected, rtol=1e-4, atol=1e-4)
    assert plan.scores.shape == (2,)
    action, _ = means.predict(one, deterministic=True)
    np.testing.assert_allclose(action, plan.actions[plan.chosen, 0], rtol=1e-6)
    batch, _ = means.predict(observations(agent, 3), deterministic=True)
    np.testing.assert_allclose(batch[0], action, rtol=1e-3, atol=1e-4)


def test_deterministic_candidates_still_differ(agent: MPDiffuserAgent) -> None:
    plan = agent.plan(pick(observations(agent, 1), 0), num_candidates=4, deterministic=True)
    assert len(np.unique(plan.observations.reshape(4, -1), axis=0)) == 4


def test_stochastic_actions_differ_and_follow_the_seed(lqr: MPDiffuserAgent) -> None:
    one = pick(observations(lqr, 1), 0)
    first, second = lqr.with_options(), lqr.with_options()
    draws = [first.predict(one)[0] for _ in range(3)]
    np.testing.assert_array_equal(draws, [second.predict(one)[0] for _ in range(3)])
    assert len(np.unique(draws)) == 3


def test_state_of_a_vector_equals_separate_runs_through_resets(pendulum: MPDiffuserAgent) -> None:
    agent = pendulum.with_options(action_chunk=3, warm_start_steps=2, budget=5.0)
    batch = observations(agent, 3)
    starts = np.random.default_rng(0).random((8, 3)) < 0.3
    together: Any = None
    alone: list[Any] = [None] * 3
    for flags in starts:
        actions, together = agent.predict(batch, together, flags, True)
        for row in range(3):
            action, alone[row] = agent.predict(
                pick(batch, row), alone[row], flags[row : row + 1], True
            )
            np.testing.assert_allclose(actions[row], action, atol=1e-5)
            assert together.position[row] == alone[row].position[0]
            assert together.budget[row] == pytest.approx(alone[row].budget[0], abs=1e-5)


def test_predict_changes_neither_state_nor_flags(lqr: MPDiffuserAgent) -> None:
    agent = lqr.with_options(action_chunk=2, warm_start_steps=2)
    batch, flags = observations(agent, 2), np.array([True, False])
    _, state = agent.predict(batch)
    before = pickle.dumps(asdict(state))
    agent.predict(batch, state, flags)
    assert pickle.dumps(asdict(state)) == before
    np.testing.assert_array_equal(flags, [True, False])


def test_a_chunk_executes_one_plan_before_the_next(lqr: MPDiffuserAgent) -> None:
    agent = lqr.with_options(action_chunk=3)
    one = pick(observations(agent, 1), 0)
    expected = agent.plan(one, deterministic=True)
    actions, state = [], None
    for _ in range(4):
        action, state = agent.predict(one, state, np.zeros(1, bool), True)
        actions.append(action)
    np.testing.assert_allclose(actions[:3], expected.actions[expected.chosen, :3], rtol=1e-5)
    np.testing.assert_allclose(actions[3], expected.actions[expected.chosen, 0], rtol=1e-5)


def test_warm_start_of_all_steps_equals_a_full_plan(lqr: MPDiffuserAgent) -> None:
    one = pick(observations(lqr, 1), 0)
    warm = lqr.with_options(warm_start_steps=TINY.diffusion_steps)
    _, state = warm.predict(one, deterministic=True)
    again, _ = warm.predict(one, state, np.zeros(1, bool), True)
    full, _ = lqr.predict(one, deterministic=True)
    np.testing.assert_array_equal(again, full)


def test_warm_start_begins_from_the_last_plan_shifted_by_what_was_executed(
    lqr: MPDiffuserAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = lqr.with_options(warm_start_steps=2, action_chunk=3)
    starts: list[Any] = []
    sample = agent._sample
    monkeypatch.setattr(agent, "_sample", lambda r: (starts.append(r.warm), sample(r))[1])
    batch = observations(agent, 2)
    _, first = agent.predict(batch, deterministic=True)
    state = first
    for _ in range(3):
        _, state = agent.predict(batch, state, np.zeros(2, bool), True)
    assert starts[0] is None and len(starts) == 2
    shifted = np.concatenate([first.plan[:, 3:], np.repeat(first.plan[:, -1:], 3, 1)], axis=1)
    np.testing.assert_array_equal(starts[1].numpy(), shifted)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.array([np.nan, 0.0]), "NaN"),
        (np.array([np.inf, 0.0]), "infinity"),
        (np.zeros(3), "shape"),
        (np.zeros((2, 3)), "shape"),
        (np.zeros((0, 2)), "shape"),
        ((np.zeros(2), {}), "env.reset"),
        ({"observation": np.zeros(2)}, "mapping"),
        ("words", "numbers"),
    ],
)
def test_bad_observations_are_refused(lqr: MPDiffuserAgent, bad: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        lqr.predict(bad)


def test_bad_dict_observations_are_refused(car: MPDiffuserAgent) -> None:
    good = pick(observations(car, 1), 0)
    with pytest.raises(InputError, match="desired_goal"):
        car.predict({key: value for key, value in good.items() if key != "desired_goal"})
    with pytest.raises(InputError, match="differ in their number"):
        car.predict({**good, "desired_goal": np.zeros((2, 2))})
    with pytest.raises(InputError, match="mapping"):
        car.predict(good["observation"])


def test_foreign_states_are_refused(lqr: MPDiffuserAgent, car: MPDiffuserAgent) -> None:
    batch = observations(lqr, 2)
    with pytest.raises(InputError, match="another agent"):
        lqr.predict(batch, car.predict(observations(car, 2))[1])
    _, state = lqr.predict(batch)
    with pytest.raises(InputError, match="2 environments"):
        lqr.predict(pick(batch, 0), state)
    with pytest.raises(InputError, match="what predict returned"):
        lqr.predict(batch, (np.zeros(2),))
    with pytest.raises(InputError, match="episode_start"):
        lqr.predict(batch, state, np.zeros(3, bool))


def test_non_finite_networks_raise_a_typed_error(lqr: MPDiffuserAgent, tmp_path: Path) -> None:
    path = tmp_path / "agent.safetensors"
    lqr.save(path)
    broken = MPDiffuserAgent.load(path)
    with torch.no_grad():
        next(broken.models["planner"].parameters()).fill_(torch.nan)
    with pytest.raises(PlanningError, match="finite"):
        broken.predict(pick(observations(lqr, 1), 0))


def test_stable_baselines_evaluates_it_unmodified(agent: MPDiffuserAgent) -> None:
    env_id = {3: PENDULUM, 2: "LQR-v0", 5: "CarUMaze-v0"}[agent._nx]
    fast = agent.with_options(action_chunk=8)
    short = {"max_episode_steps": 12}
    single = gym.make(env_id, **short)
    with pytest.warns(UserWarning, match="Monitor"):
        mean, _ = evaluate_policy(fast, single, n_eval_episodes=1)
    assert np.isfinite(mean)
    vector = make_vec_env(env_id, 3, env_kwargs=short)
    mean, _ = evaluate_policy(fast, vector, n_eval_episodes=4)
    assert np.isfinite(mean)


# --- plan ------------------------------------------------------------------------------------


def test_plan_has_the_promised_shapes(agent: MPDiffuserAgent) -> None:
    one = pick(observations(agent, 1), 0)
    plan = agent.plan(one, num_candidates=5)
    assert plan.observations.shape == (5, 8, agent._nx)
    assert plan.actions.shape == (5, 8, *agent.action_space.shape)
    assert plan.scores.shape == plan.feasible.shape == (5,)
    assert plan.scores[plan.chosen] == plan.scores[plan.feasible].max()
    assert {"sample", "rank", "total"} <= set(plan.seconds)
    low, high = agent.action_space.low, agent.action_space.high
    assert ((plan.actions >= low) & (plan.actions <= high)).all()


def test_plan_takes_one_observation(lqr: MPDiffuserAgent) -> None:
    with pytest.raises(InputError, match="one observation"):
        lqr.plan(observations(lqr, 2))


def test_predicted_returns_are_discounted_sums(lqr: MPDiffuserAgent) -> None:
    agent = lqr.with_options()
    agent.set_reward(lambda x, u, y: np.full(u.shape[:2], 2.0))
    plan = agent.plan(pick(observations(lqr, 1), 0), num_candidates=2)
    expected = 2.0 * sum(TINY.discount**t for t in range(8))
    assert plan.returns is not None
    np.testing.assert_allclose(plan.returns, expected)


def test_actions_can_be_read_off_the_planned_states(lqr: MPDiffuserAgent, tmp_path: Path) -> None:
    agent, observation = lqr.with_options(), pick(observations(lqr, 1), 0)
    usual = agent.plan(observation, num_candidates=3)
    agent.set_inverse_dynamics(lambda x, u, y: y[..., :1] - x[..., :1])
    agent.set_reward(lambda x, u, y: u[..., 0])
    plan = agent.with_options().plan(observation, num_candidates=3)
    states = np.concatenate([np.tile(observation, (3, 1, 1)), plan.observations], axis=1)
    expected = np.clip(np.diff(states[..., :1], axis=1), -10, 10)
    np.testing.assert_allclose(plan.actions, expected, rtol=1e-6)
    assert not np.allclose(plan.actions, usual.actions)
    ranked = expected[..., 0] @ TINY.discount ** np.arange(expected.shape[1])
    np.testing.assert_allclose(plan.returns, ranked)  # what is executed is ranked
    action, _ = agent.predict(observation)
    assert action.shape == (1,)
    assert agent.has_caller_functions and not lqr.has_caller_functions
    with pytest.warns(UserWarning, match="not saved"):
        agent.save(tmp_path / "agent.safetensors")
    for wrong in (np.zeros(3), np.full((1, 8, 1), np.nan)):
        agent.set_inverse_dynamics(lambda x, u, y, wrong=wrong: wrong)
        with pytest.raises(InputError, match="inverse dynamics"):
            agent.predict(observation)
    agent.set_inverse_dynamics(None)
    agent.predict(observation)


def test_termination_ends_rewards_and_costs_a_penalty(pendulum: MPDiffuserAgent) -> None:
    agent = pendulum.with_options(termination_penalty=10.0)
    ends = np.zeros(8)
    ends[3] = ends[5] = 1.0  # only the first counts

    def termination(x: Any, u: Any, y: Any, goals: Any) -> Any:
        return np.broadcast_to(ends - 0.5, u.shape[:2])

    agent.objective = replace(agent.objective, learned_termination=termination)
    agent.set_reward(lambda x, u, y: np.ones(u.shape[:2]))
    plan = agent.plan(pick(observations(agent, 1), 0), num_candidates=2)
    expected = sum(TINY.discount**t for t in range(4)) - 10.0 * TINY.discount**3
    assert plan.returns is not None
    np.testing.assert_allclose(plan.returns, expected)


def test_small_predicted_costs_count_as_none(pendulum: MPDiffuserAgent) -> None:
    learned = np.array([0.02, 0.3, 0.49, 0.5, 0.0, 0.9, 0.1, 0.2])
    agent = pendulum.with_options(cost_threshold=0.5)
    agent.objective = replace(
        agent.objective, learned_cost=lambda x, u, y, goals: np.broadcast_to(learned, u.shape[:2])
    )
    plan = agent.plan(pick(observations(agent, 1), 0), num_candidates=2, budget=0.0)
    assert plan.costs is not None
    expected = 0.5 * TINY.discount**3 + 0.9 * TINY.discount**5
    np.testing.assert_allclose(plan.costs, expected)
    assert not plan.feasible.any()
    clean = agent.with_options(cost_threshold=0.95)
    assert clean.plan(pick(observations(agent, 1), 0), budget=0.0).feasible.all()


def test_the_dynamics_model_can_be_left_in_the_dark(pendulum: MPDiffuserAgent) -> None:
    batch = observations(pendulum, 2)

    def planned(**options: Any) -> Any:
        agent = pendulum.with_options(num_steps=3, **options)
        _, state = agent.predict(batch, deterministic=True)
        return agent.planned(state)[0]

    for scale in (0.5, 3.0):  # the same as the planner's unless given
        alike = (
            planned(guidance_scale=scale),
            planned(guidance_scale=scale, dynamics_guidance_scale=scale),
        )
        np.testing.assert_array_equal(*alike)
    dark = planned(guidance_scale=1.0, dynamics_guidance_scale=0.0)
    assert not np.array_equal(dark, planned(guidance_scale=1.0))
    alone = {"composition": "planner_only", "guidance_scale": 1.0}
    np.testing.assert_array_equal(planned(**alone), planned(**alone, dynamics_guidance_scale=0.0))


# --- functions and options at run time ---------------------------------------------------------


@pytest.mark.parametrize("setter", ["reward", "cost", "ranker", "inverse_dynamics"])
def test_what_is_no_function_is_refused_at_once(lqr: MPDiffuserAgent, setter: str) -> None:
    agent = lqr.with_options()
    with pytest.raises(ConfigError, match="expected a function or None; got 3"):
        getattr(agent, f"set_{setter}")(3)
    assert not agent.has_caller_functions


def test_unknown_devices_and_empty_data_are_named(tmp_path: Path) -> None:
    tiny_agent("LQR-v0").save(tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"device: expected 'auto', 'cpu'.*got 'gpu'"):
        MPDiffuserAgent.load(tmp_path / "a.safetensors", device="gpu")
    with pytest.raises(ConfigError, match="dataset: expected at least one"):
        MPDiffuserAgent.fit([], preset("laptop"))


def test_a_callers_reward_decides(lqr: MPDiffuserAgent) -> None:
    agent = lqr.with_options(num_candidates=6)
    agent.set_reward(lambda x, u, y: -np.abs(u[..., 0] - 0.01))
    plan = agent.plan(pick(observations(lqr, 1), 0))
    weights = TINY.discount ** np.arange(8)
    sums = -np.abs(plan.actions[..., 0] - 0.01) @ weights
    assert plan.chosen == sums.argmax()
    assert not lqr.has_caller_functions


def test_reward_functions_see_aligned_steps_in_environment_units(lqr: MPDiffuserAgent) -> None:
    seen: dict[str, Any] = {}

    def reward(x: Any, u: Any, y: Any) -> Any:
        seen.update(x=x, u=u, y=y)
        return np.zeros(u.shape[:2])

    agent = lqr.with_options(num_candidates=3)
    agent.set_reward(reward)
    one = pick(observations(lqr, 1), 0)
    plan = agent.plan(one)
    np.testing.assert_array_equal(seen["x"][:, 0], np.broadcast_to(one, (3, 2)))
    np.testing.assert_array_equal(seen["x"][:, 1:], seen["y"][:, :-1])
    np.testing.assert_array_equal(seen["y"], plan.observations)
    np.testing.assert_array_equal(seen["u"], plan.actions)


def test_a_function_of_the_wrong_shape_is_refused(lqr: MPDiffuserAgent) -> None:
    agent = lqr.with_options()
    agent.set_reward(lambda x, u, y: np.zeros(3))
    with pytest.raises(InputError, match="reward function"):
        agent.predict(pick(observations(lqr, 1), 0))


def test_reward_and_cost_functions_may_see_the_goals(
    car: MPDiffuserAgent, lqr: MPDiffuserAgent
) -> None:
    agent = car.with_options(num_candidates=3)
    agent.set_reward(
        lambda x, u, y, goals: -np.abs(y[..., :2] - goals[:, None, :2]).sum(-1), goals=True
    )
    agent.set_cost(
        lambda x, u, y, goals: np.zeros(u.shape[:2]) + goals[:, None, 0] ** 2, goals=True
    )
    for i in range(2):
        one = pick(observations(car, 2), i)
        plan, goal = agent.plan(one), one["desired_goal"]
        weights = agent.objective.discount ** np.arange(plan.actions.shape[1])
        misses = np.abs(plan.observations[..., :2] - goal[:2]).sum(-1)
        np.testing.assert_allclose(plan.returns, -misses @ weights)
        np.testing.assert_allclose(plan.costs, goal[0] ** 2 * weights.sum())
    with pytest.raises(ConfigError, match="desired_goal"):
        lqr.set_reward(lambda x, u, y, goals: u[..., 0], goals=True)


def test_candidates_with_nan_scores_never_win(lqr: MPDiffuserAgent) -> None:
    agent = lqr.with_options(num_candidates=4)

    def reward(x: Any, u: Any, y: Any) -> Any:
        values = np.ones(u.shape[:2])
        values[:3] = np.nan
        return values

    agent.set_reward(reward)
    assert agent.plan(pick(observations(lqr, 1), 0)).chosen == 3


def test_budget_filters_candidates(pendulum: MPDiffuserAgent) -> None:
    agent = pendulum.with_options(num_candidates=4, budget=1.0)
    costs = np.array([9.0, 0.0, 0.5, 9.0])
    rewards = np.array([4.0, 1.0, 2.0, 3.0])
    first = np.zeros(8)
    first[0] = 1.0
    agent.set_cost(lambda x, u, y: costs[:, None] * first)
    agent.set_reward(lambda x, u, y: rewards[:, None] * first)
    one = pick(observations(agent, 1), 0)
    plan = agent.plan(one)
    assert plan.chosen == 2
    np.testing.assert_array_equal(plan.feasible, [False, True, True, False])
    assert agent.plan(one, budget=0.0).chosen == 1
    costs += 1.0
    assert agent.plan(one, budget=0.0).chosen == 1  # none is feasible: the least cost


def test_remaining_budget_falls_by_the_cost_of_executed_steps(pendulum: MPDiffuserAgent) -> None:
    agent = pendulum.with_options(budget=2.5, action_chunk=2)
    agent.set_cost(lambda x, u, y: (y[..., 2] > 100.0) + 0.75)
    one = pick(observations(agent, 1), 0)
    left, state = [], None
    for flag in (True, False, False, False, False, True):
        _, state = agent.predict(one, state, np.array([flag]), True)
        left.append(float(state.budget[0]))
    assert left == [2.5, 1.75, 1.0, 0.25, 0.0, 2.5]


def test_an_observation_can_supply_the_remaining_budget() -> None:
    env = RemainingBudget(gym.make(PENDULUM), 3.0)
    data = load_episodes(
        [
            replace(episode, observations={"observation": episode.observations})
            for episode in play(PENDULUM)
        ],
        metadata={
            "observation_space": spaces.Dict({"observation": env.env.observation_space}),
            "action_space": env.action_space,
        },
    )
    config = replace(TINY, conditions=("cost",), cost_model=True)
    trained = MPDiffuserAgent.fit(data, config, progress=False)
    agent = MPDiffuserAgent(
        trained.config,
        trained.models,
        env.observation_space,
        env.action_space,
        trained.normalizers,
        trained.conditions,
    )
    observation, _ = env.reset(seed=0)
    _, state = agent.predict(observation)
    assert state.budget[0] == 3.0
    _, state = agent.predict({**observation, "remaining_budget": np.array([1.25])}, state)
    assert state.budget[0] == 1.25


def test_a_budget_without_a_cost_is_refused_at_the_step_it_matters(lqr: MPDiffuserAgent) -> None:
    agent = lqr.with_options(budget=1.0)
    with pytest.raises(ConfigError, match="cost_model=True"):
        agent.predict(pick(observations(lqr, 1), 0))


def test_with_options_shares_weights_and_leaves_the_first_alone(lqr: MPDiffuserAgent) -> None:
    other = lqr.with_options(num_candidates=7)
    assert other.models is lqr.models
    assert (lqr.options.num_candidates, other.options.num_candidates) == (1, 7)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_candidate": 3}, "num_candidates"),
        ({"num_candidates": 0}, "num_candidates"),
        ({"temperature": -1.0}, "temperature"),
        ({"composition": "alternate"}, "alternating"),
        ({"sampler": "dpm"}, "ddpm"),
        ({"spacing": "log"}, "log_snr"),
        ({"action_chunk": 9}, "8 actions"),
        ({"num_steps": 7}, "num_steps"),
        ({"warm_start_steps": 7}, "warm_start_steps"),
        ({"ranker": "best"}, "ranker"),
        ({"condition_values": {"goal": (1.0,)}}, "goal"),
        ({"budget": float("nan")}, "budget"),
        ({"return_scale": float("inf")}, "return_scale"),
    ],
)
def test_bad_options_are_refused(lqr: MPDiffuserAgent, option: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lqr.with_options(**option)


@pytest.mark.parametrize(
    "composition",
    [
        "planner_only",
        "alternating",
        "alternating_matched",
        "alternating_resampled",
        "combined_score",
    ],
)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_every_composition_and_sampler_acts(
    lqr: MPDiffuserAgent, composition: str, sampler: str
) -> None:
    agent = lqr.with_options(
        composition=composition, sampler=sampler, num_steps=3, guidance_scale=2.0
    )
    action, _ = agent.predict(pick(observations(lqr, 1), 0), deterministic=True)
    assert np.isfinite(action).all()


# --- conditions ----------------------------------------------------------------------------------


def plans_differ(first: MPDiffuserAgent, one: Any, second: MPDiffuserAgent, other: Any) -> bool:
    left, right = (a.plan(o, deterministic=True) for a, o in ((first, one), (second, other)))
    return bool(np.any(left.observations != right.observations))


def test_goal_and_return_reach_the_networks(car: MPDiffuserAgent, lqr: MPDiffuserAgent) -> None:
    one = pick(observations(car, 1), 0)
    moved = {**one, "desired_goal": one["desired_goal"] + 3.0}
    assert plans_differ(car, one, car, moved)
    assert not plans_differ(car, one, car, one)
    row = pick(observations(lqr, 1), 0)
    assert plans_differ(lqr.with_options(return_scale=0.0), row, lqr, row)


def test_a_condition_without_a_value_is_absent() -> None:
    agent = tiny_agent("LQR-v0", conditions=("final_state",))
    row = np.array([0.1, 0.1])
    origin = agent.with_options(condition_values={"final_state": (0.0, 0.0)})
    assert plans_differ(agent, row, origin, row)


def test_custom_conditions_are_learned_and_asked_for() -> None:
    spec = ConditionSpec("custom", name="speed", size=1)
    config = replace(TINY, conditions=(spec,))
    agent = MPDiffuserAgent.fit(
        source("LQR-v0"),
        config,
        condition_functions={"speed": lambda episode: episode.observations[:-1, 1:]},
        progress=False,
    ).with_options(condition_values={"speed": (0.1,)})
    assert np.isfinite(agent.predict(np.zeros(2))[0]).all()


# --- training ------------------------------------------------------------------------------------


def test_the_general_preset_minds_time_limits_and_the_papers_does_not() -> None:
    laptop, paper = preset("laptop"), preset("paper")
    for config, horizon, padding in (laptop, "auto", "terminal"), (paper, "to_go", "zeros"):
        goal, asked = config.conditions
        assert (goal.kind, goal.when) == ("goal", "goals")
        assert (asked.kind, asked.when) == ("return", "no_goals")
        assert (asked.horizon, config.padding) == (horizon, padding)


@pytest.mark.parametrize(("env_id", "kind"), [("LQR-v0", "return"), ("CarUMaze-v0", "goal")])
def test_goals_in_the_data_are_seen_without_being_asked_for(env_id: str, kind: str) -> None:
    config = replace(TINY, conditions=preset("laptop").conditions)
    agent = MPDiffuserAgent.fit(source(env_id), config, progress=False)
    assert list(agent.conditions.sizes) == [kind]
    assert all(spec.is_settled for spec in agent.config.conditions)
    again = agent.with_new_dynamics(source(env_id), config, progress=False)
    assert again.config.conditions == agent.config.conditions


def test_a_learned_reward_sees_the_goal() -> None:
    """Rewards are distances to the goal: what is learned of one goal must not be told of others."""
    data = source("CarUMaze-v0", episodes=60, reward_type="dense")
    config = replace(
        TINY,
        conditions=(ConditionSpec("goal", name="target"),),
        reward_model=True,
        regressor_training=TrainingConfig(steps=400, batch_size=64, learning_rate=3e-3),
    )
    agent = MPDiffuserAgent.fit(data, config, progress=False)
    episode = data.episode(0)
    start = episode.observations["observation"]
    goals = np.stack([data.episode(i).observations["desired_goal"][0] for i in range(40)])
    goals = goals[goals[:, 1] * start[0, 1] < 0]  # in the other arm, as in the data
    states, actions = start[None, :2].repeat(len(goals), 0), np.zeros((len(goals), 1, 2))
    returns, _ = agent.objective.totals(states, actions, goals, 0.0)
    assert returns is not None
    distances = np.linalg.norm(states[:, 0, :2] - goals, axis=1)
    assert np.abs(returns + distances).mean() < 0.2 * distances.std()
    # The same through the agent: candidates are scored with the goal that is in the observation.
    plan = agent.plan(
        {key: value[0] for key, value in episode.observations.items()}, num_candidates=2
    )
    assert plan.returns is not None
    whole = np.concatenate([states[:2, :1], plan.observations], axis=1)
    again, _ = agent.objective.totals(whole, plan.actions, goals[:1].repeat(2, 0), 0.0)
    np.testing.assert_allclose(again, plan.returns)


def test_a_warning_tells_of_goals_that_an_agent_does_not_see() -> None:
    config = replace(TINY, conditions=("return",))
    with pytest.warns(UserWarning, match=r"desired_goal .* not see; add ConditionSpec\('goal'\)"):
        MPDiffuserAgent.fit(source("CarUMaze-v0"), config, progress=False)


def test_more_noise_than_fits_through_a_network_is_not_what_it_predicts() -> None:
    """A width of 32 carries the noise of 8 columns."""
    general = preset("laptop")
    assert general.resolved(5, 3, {"return": 1}).loss.prediction == "noise"
    assert general.resolved(6, 3, {"return": 1}).loss.prediction == "x0"
    noise = replace(general, loss=LossConfig())
    with pytest.warns(UserWarning, match=r"of 8 columns.* 32, trajectories have 9.* to 36 or"):
        assert noise.resolved(6, 3, {"return": 1}) == noise


@pytest.mark.parametrize(("width", "prediction"), [(8, "x0"), (16, "noise")])
def test_what_is_predicted_is_settled_once(width: int, prediction: str, tmp_path: Path) -> None:
    config = replace(
        TINY,
        loss=LossConfig(prediction="auto"),
        unet=replace(TINY.unet, width=width),
        conditions=(ConditionSpec("return", horizon="auto"),),
        padding="terminal",
    )
    agent = MPDiffuserAgent.fit(source("LQR-v0"), config, progress=False)
    agent.save(tmp_path / "agent.safetensors")
    assert MPDiffuserAgent.load(tmp_path / "agent.safetensors").config == agent.config
    assert agent.config.loss.prediction == prediction
    assert [spec.horizon for spec in agent.config.conditions] == [12]  # half of 24 steps
    again = agent.with_new_dynamics(source("LQR-v0"), config, progress=False)
    assert again.config.loss.prediction == prediction
    assert again.config.conditions == agent.config.conditions
    other = replace(config, loss=LossConfig(prediction="x0" if prediction == "noise" else "noise"))
    with pytest.raises(ConfigError, match=f"another planner.*predicts {prediction}"):
        agent.with_new_dynamics(source("LQR-v0"), other, progress=False)


def test_overfit_on_one_trajectory_reproduces_it() -> None:
    episode = play("LQR-v0", episodes=1, steps=8)[0]
    env = gym.make("LQR-v0")
    data = load_episodes(
        [episode],
        metadata={"observation_space": env.observation_space, "action_space": env.action_space},
    )
    config = replace(
        TINY,
        unet=UnetConfig(width=16, multipliers=(1, 2)),
        diffusion_steps=20,
        training=TrainingConfig(steps=800, batch_size=32, learning_rate=3e-3, schedule="cosine"),
        validation_fraction=0.0,
    )
    agent = MPDiffuserAgent.fit(data, config, progress=False).with_options(temperature=0.01)
    plan = agent.plan(episode.observations[0], deterministic=True)
    spread = episode.observations[1:].std(axis=0)
    error = np.abs(plan.observations[0] - episode.observations[1:]) / spread
    assert error.mean() < 0.15


def test_finetuning_leaves_every_other_weight_bit_identical() -> None:
    agent = tiny_agent("LQR-v0", reward_model=True)
    before = {role: pickle.dumps(m.state_dict()) for role, m in agent.models.items()}
    training = replace(agent.config.training, steps=100, warmup_steps=50)
    data = source("LQR-v0", episodes=3)
    result = agent.finetune_dynamics(data, 10, training=training, progress=False)
    changed = {r for r, m in agent.models.items() if pickle.dumps(m.state_dict()) != before[r]}
    assert changed == {"dynamics"}
    assert result.step == 10
    assert "dynamics-finetuned" in agent.history


def test_dynamics_model_learns_from_its_own_data() -> None:
    first, second = source("LQR-v0"), source("LQR-v0", episodes=6)
    joint = MPDiffuserAgent.fit(first, TINY, progress=False)
    apart = MPDiffuserAgent.fit(first, TINY, dynamics_dataset=[first, second], progress=False)
    weights = [next(a.models["dynamics"].parameters()) for a in (joint, apart)]
    assert not torch.equal(*weights)


def test_fit_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = tiny_agent("LQR-v0")
    assert torch.equal(torch.rand(1), expected)
    second = tiny_agent("LQR-v0")
    for role, model in first.models.items():
        for left, right in zip(
            model.state_dict().values(), second.models[role].state_dict().values(), strict=True
        ):
            assert torch.equal(left, right)


@pytest.mark.slow
def test_parallel_training_equals_training_one_after_the_other() -> None:
    data = source("LQR-v0")
    apart = MPDiffuserAgent.fit(data, TINY, progress=False)
    together = MPDiffuserAgent.fit(data, TINY, progress=False, parallel=True)
    for role, model in apart.models.items():
        for left, right in zip(
            model.state_dict().values(), together.models[role].state_dict().values(), strict=True
        ):
            assert torch.equal(left, right)


def test_a_new_dynamics_model_stands_beside_the_same_planner(pendulum: MPDiffuserAgent) -> None:
    before = {
        name: value.clone() for name, value in pendulum.models["dynamics"].state_dict().items()
    }
    config = replace(pendulum.config, dynamics_conditions=False)
    other = pendulum.with_new_dynamics(play(PENDULUM), config, progress=False)
    assert other.models["planner"] is pendulum.models["planner"]
    assert other.models["dynamics"].config.conditions == ()
    for name, value in pendulum.models["dynamics"].state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(ConfigError, match="another planner"):
        pendulum.with_new_dynamics(play(PENDULUM), replace(config, horizon=16), progress=False)


def test_cost_model_needs_costs() -> None:
    with pytest.raises(ConfigError, match="no costs"):
        tiny_agent("LQR-v0", cost_model=True)


def test_binary_costs_are_learned_as_probabilities_and_other_costs_are_refused() -> None:
    options = {"cost_model": True, "binary_costs": True}
    agent = tiny_agent(PENDULUM, **options)
    rows = np.random.default_rng(0).normal(size=(2, 5, 3))
    assert agent.objective.learned_cost is not None
    cost = agent.objective.learned_cost(rows, rows[..., :1], rows, None)
    assert ((cost > 0) & (cost < 1)).all()
    half = [replace(episode, costs=0.5 * np.ones(len(episode))) for episode in play(PENDULUM)]
    with pytest.raises(ConfigError, match=r"binary_costs.*from 0.5 to 0.5"):
        MPDiffuserAgent.fit(half, replace(TINY, **options), progress=False)
    with pytest.raises(ConfigError, match=r"binary_costs.*cost_model=True"):
        replace(TINY, binary_costs=True)


# --- files ---------------------------------------------------------------------------------------


def test_save_then_load_gives_bit_equal_actions(agent: MPDiffuserAgent, tmp_path: Path) -> None:
    path = tmp_path / "agent.safetensors"
    chosen = agent.with_options(num_candidates=3, action_chunk=2, temperature=0.3)
    chosen.save(path)
    loaded = MPDiffuserAgent.load(path)
    assert loaded.options == chosen.options
    batch = observations(agent, 3)
    state = other = None
    for flag in (True, False, False, True):
        flags = np.full(3, flag)
        left, state = chosen.predict(batch, state, flags)
        right, other = loaded.predict(batch, other, flags)
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, float("nan"), None])
def test_numbers_of_samples_are_whole_and_positive(lqr: MPDiffuserAgent, bad: Any) -> None:
    for name in ("num_candidates", "samples_per_candidate"):
        with pytest.raises(ConfigError, match=rf"{name}: expected an integer >= 1"):
            lqr.with_options(**{name: bad})


def test_options_at_load_replace_the_saved_ones(lqr: MPDiffuserAgent, tmp_path: Path) -> None:
    path = tmp_path / "agent.safetensors"
    lqr.save(path)
    assert MPDiffuserAgent.load(path, num_candidates=8).options.num_candidates == 8
    with pytest.raises(ConfigError, match="num_candidates"):
        MPDiffuserAgent.load(path, candidates=8)


def test_save_says_that_functions_are_not_saved(lqr: MPDiffuserAgent, tmp_path: Path) -> None:
    agent = lqr.with_options()
    agent.set_reward(lambda x, u, y: np.zeros(u.shape[:2]))
    with pytest.warns(UserWarning, match="not saved"):
        agent.save(tmp_path / "agent.safetensors")


@pytest.fixture(scope="module")
def stored(lqr: MPDiffuserAgent, tmp_path_factory: pytest.TempPathFactory) -> Iterator[bytes]:
    path = tmp_path_factory.mktemp("stored") / "agent.safetensors"
    lqr.save(path)
    yield path.read_bytes()


def test_flipped_bytes_are_caught(stored: bytes, tmp_path: Path) -> None:
    path = tmp_path / "agent.safetensors"
    places = np.random.default_rng(0).integers(len(stored), size=60)
    for place in [0, 7, 8, len(stored) - 1, *places]:
        flipped = bytearray(stored)
        flipped[place] ^= 1 << int(place) % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            MPDiffuserAgent.load(path)


def test_truncated_pickled_and_missing_files_are_refused(stored: bytes, tmp_path: Path) -> None:
    path = tmp_path / "agent.safetensors"
    for length in (0, 5, 100, len(stored) // 2, len(stored) - 1):
        path.write_bytes(stored[:length])
        with pytest.raises(CheckpointError):
            MPDiffuserAgent.load(path)
    path.write_bytes(pickle.dumps({"weights": 1}))
    with pytest.raises(CheckpointError, match="pickle"):
        MPDiffuserAgent.load(path)
    with pytest.raises(CheckpointError, match="no such file"):
        MPDiffuserAgent.load(tmp_path / "nothing.safetensors")


def test_a_file_that_contradicts_its_configuration_is_refused(
    lqr: MPDiffuserAgent, tmp_path: Path
) -> None:
    from mpd_gym.checkpoint import load_file, save_file

    path = tmp_path / "agent.safetensors"
    lqr.save(path)
    tensors, header = load_file(path, kind="agent")
    plain = {
        k: v for k, v in header.items() if k not in ("format_version", "kind", "package_version")
    }
    wider = json.loads(json.dumps(plain))
    wider["config"]["unet"]["width"] = 16
    save_file(path, tensors, wider, kind="agent")
    with pytest.raises(CheckpointError):
        MPDiffuserAgent.load(path)
    save_file(path, tensors, {**plain, "agent": "other"}, kind="agent")
    with pytest.raises(CheckpointError, match="other"):
        MPDiffuserAgent.load(path)
    extra = {**tensors, "models/value/weight": torch.zeros(1)}
    save_file(path, extra, plain, kind="agent")
    with pytest.raises(CheckpointError, match="does not name"):
        MPDiffuserAgent.load(path)


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["laptop", "paper"])
@pytest.mark.parametrize("env_id", [None, "LQR-v0", "CarUMaze-v0", PENDULUM])
def test_presets_survive_json(size: str, env_id: str | None) -> None:
    config = preset(size, env_id)
    assert MPDiffuserConfig.from_json(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizon": 30, "unet": UnetConfig()}, "30"),
        ({"conditions": ("returns",)}, "return"),
        ({"schedule": "cosin"}, "cosine"),
        ({"null": "none"}, "null"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"regressor_inputs": "states"}, "inputs"),
        ({"diffusion_steps": 0}, "[Ll]evels|steps"),
        ({"discount": 1.5}, "discount"),
    ],
)
def test_contradictory_configurations_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)


def test_unknown_fields_are_refused_with_the_closest() -> None:
    with pytest.raises(ConfigError, match="horizon"):
        MPDiffuserConfig.from_json({"horizn": 32})


def test_inpainting_plans_one_step_less_and_keeps_x_0() -> None:
    agent = tiny_agent("LQR-v0", initial_state="inpaint", conditions=("final_state",))
    row = np.array([0.05, -0.1])
    plan = agent.plan(row, num_candidates=2)
    assert plan.observations.shape == (2, 7, 2)
    assert plan.actions.shape == (2, 7, 1)
    _, state = agent.predict(row)
    kept = agent.normalizers.observation.unnormalize(state.plan[:, 0, :2])
    np.testing.assert_allclose(kept[0], row, atol=1e-6)


@pytest.mark.parametrize("prediction", [None, "x0"])
def test_the_dynamics_model_may_predict_clean_states(prediction: Any, tmp_path: Path) -> None:
    config = replace(TINY, dynamics_prediction=prediction)
    agent = MPDiffuserAgent.fit(source("LQR-v0"), config, progress=False)
    told = [agent._task(role).loss.prediction for role in ("planner", "dynamics")]
    assert told == ["noise", prediction or "noise"]
    agent.save(tmp_path / "agent.safetensors")
    agent = MPDiffuserAgent.load(tmp_path / "agent.safetensors", device="cpu", precision="plain")
    head = agent.models["dynamics"].unet.head[-1]
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)  # the network's output is 0
    request = agent._request(
        agent._reader.read(np.zeros(2, np.float32)), np.full(1, np.inf), None, False
    )
    level = config.diffusion_steps
    noisy = torch.full((1, config.horizon, 3), 1e-3)
    clean = agent._denoiser("dynamics", request, [level])(noisy, level)
    signal = agent._schedule.signal(level)
    expected = 0.0 if prediction == "x0" else 1e-3 / signal
    torch.testing.assert_close(clean, torch.full_like(clean, expected).clamp(-1, 1))
    with pytest.raises(ConfigError, match="dynamics_prediction"):
        replace(TINY, dynamics_prediction="score")
