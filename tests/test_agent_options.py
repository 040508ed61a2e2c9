"""What an agent takes at run time: functions of the caller's, budgets, options, conditions."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from helpers import PENDULUM, TINY, observations, pick, play, source, tiny_agent

from mpd_gym import MPDiffuserAgent
from mpd_gym.agents import AGENTS, StateLimit, agent_class
from mpd_gym.agents.options import SamplingConfig
from mpd_gym.agents.spaces import Spaces
from mpd_gym.datasets import ConditionSpec, WindowConfig, load_episodes
from mpd_gym.diffusion import SafetyConfig
from mpd_gym.diffusion.loss import LossConfig
from mpd_gym.envs.wrappers import RemainingBudget
from mpd_gym.errors import ConfigError, InputError
from mpd_gym.latent import EncoderConfig
from mpd_gym.models import UnetConfig
from mpd_gym.training import TrainingConfig

# --- functions ------------------------------------------------------------------------------------


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


@pytest.mark.fault(
    "Callers' functions", "a reward, cost or ranker that is no function", "refused when it is set"
)
@pytest.mark.parametrize("setter", ["reward", "cost", "ranker", "inverse_dynamics"])
def test_what_is_no_function_is_refused_at_once(lqr: MPDiffuserAgent, setter: str) -> None:
    agent = lqr.with_options()
    with pytest.raises(ConfigError, match="expected a function or None; got 3"):
        getattr(agent, f"set_{setter}")(3)
    assert not agent.has_caller_functions


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


@pytest.mark.fault(
    "Callers' functions",
    "a reward function that returns another shape",
    "refused, with both shapes",
)
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


@pytest.mark.fault("Callers' functions", "scores that are NaN", "those candidates never win")
def test_candidates_with_nan_scores_never_win(lqr: MPDiffuserAgent) -> None:
    agent = lqr.with_options(num_candidates=4)

    def reward(x: Any, u: Any, y: Any) -> Any:
        values = np.ones(u.shape[:2])
        values[:3] = np.nan
        return values

    agent.set_reward(reward)
    assert agent.plan(pick(observations(lqr, 1), 0)).chosen == 3


# --- costs and budgets ----------------------------------------------------------------------------


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
    known = Spaces(env.observation_space, env.action_space)
    agent = MPDiffuserAgent(replace(trained.parts, spaces=known))
    observation, _ = env.reset(seed=0)
    _, state = agent.predict(observation)
    assert state.budget[0] == 3.0
    _, state = agent.predict({**observation, "remaining_budget": np.array([1.25])}, state)
    assert state.budget[0] == 1.25


def test_a_budget_without_a_cost_is_refused_at_the_step_it_matters(lqr: MPDiffuserAgent) -> None:
    agent = lqr.with_options(budget=1.0)
    with pytest.raises(ConfigError, match="cost_model=True"):
        agent.predict(pick(observations(lqr, 1), 0))


# --- options --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, float("nan"), None])
def test_numbers_of_samples_are_whole_and_positive(lqr: MPDiffuserAgent, bad: Any) -> None:
    for name in ("num_candidates", "samples_per_candidate"):
        with pytest.raises(ConfigError, match=rf"{name}: expected an integer >= 1"):
            lqr.with_options(**{name: bad})


CONFIGS = [
    SamplingConfig(),
    SafetyConfig(),
    TrainingConfig(),
    EncoderConfig(),
    UnetConfig(),
    LossConfig(),
    WindowConfig(),
    ConditionSpec("custom", name="push", size=2),
    StateLimit(0, low=-1.0, high=1.0),
    *(agent_class(name).config_type() for name in sorted(AGENTS)),
]


@pytest.mark.fault(
    "Training",
    "numbers of a configuration that are NaN, infinite, 10**400, text, arrays",
    "refused",
)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_every_number_of_a_configuration_is_finite(config: Any) -> None:
    numbers = [
        field.name
        for field in fields(config)
        if str(field.type) in ("int", "float", "int | None", "float | None")
    ]
    assert numbers
    for name in numbers:
        for bad in (np.nan, np.inf, -np.inf, 10**400, -(10**400), "x", 1j, [1], np.ones(2)):
            with pytest.raises(ConfigError, match=name):
                pytest.fail(f"{name}: {replace(config, **{name: bad})}")


@pytest.mark.parametrize("bad", [[np.nan], [10**400], "12", 3.0, [None], [[1.0]]])
def test_every_number_of_a_sampling_option_is_finite(lqr: MPDiffuserAgent, bad: Any) -> None:
    with pytest.raises(ConfigError, match="dynamics_levels"):
        lqr.with_options(dynamics_levels=bad)
    with pytest.raises(ConfigError, match=r"condition_values\['return'\]: expected"):
        lqr.with_options(condition_values={"return": bad})


# --- conditions -----------------------------------------------------------------------------------


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
