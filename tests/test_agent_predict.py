"""What `MPDiffuserAgent` promises of predict and plan: shapes, states, chunks, warm starts."""

from __future__ import annotations

import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import PENDULUM, TINY, observations, pick, stacked, tiny_agent
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from mpd_gym import MPDiffuserAgent
from mpd_gym.errors import ConfigError, InputError, PlanningError

# --- predict --------------------------------------------------------------------------------------


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


def test_reseeded_actions_come_again(lqr: MPDiffuserAgent) -> None:
    observation = observations(lqr, 1)[0]

    def drawn(seed: int) -> Any:
        lqr.reseed(seed)
        return lqr.predict(observation)[0]

    first = drawn(2**32 - 1)
    assert not np.array_equal(drawn(0), first)
    np.testing.assert_array_equal(drawn(2**32 - 1), first)


@pytest.mark.parametrize("seed", [-1, 1.5, None])
def test_what_is_no_seed_is_refused(lqr: MPDiffuserAgent, seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed: expected an integer >= 0"):
        lqr.reseed(seed)


def test_an_agent_shows_itself_with_the_options_that_it_was_given(lqr: MPDiffuserAgent) -> None:
    shown = repr(lqr.with_options(num_candidates=7))
    assert shown.startswith("MPDiffuserAgent(observation=Box(")
    assert ", num_candidates=7" in shown and "eta" not in shown


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


@pytest.mark.fault(
    "Observations and actions", "state and episode_start that the caller keeps", "never changed"
)
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


@pytest.mark.fault(
    "Observations and actions",
    "observations that are NaN, of another shape, empty, text, a mapping, (obs, info)",
    "refused; the message names which",
)
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


@pytest.mark.fault(
    "Observations and actions",
    "a Dict observation without a key, or with other batch sizes",
    "refused, with the key",
)
def test_bad_dict_observations_are_refused(car: MPDiffuserAgent) -> None:
    good = pick(observations(car, 1), 0)
    with pytest.raises(InputError, match="desired_goal"):
        car.predict({key: value for key, value in good.items() if key != "desired_goal"})
    with pytest.raises(InputError, match="differ in their number"):
        car.predict({**good, "desired_goal": np.zeros((2, 2))})
    with pytest.raises(InputError, match="mapping"):
        car.predict(good["observation"])


@pytest.mark.fault(
    "Observations and actions", "a state of another agent, batch size or type", "refused"
)
def test_foreign_states_are_refused(lqr: MPDiffuserAgent, car: MPDiffuserAgent) -> None:
    batch = observations(lqr, 2)
    with pytest.raises(InputError, match="another agent"):
        lqr.predict(batch, car.predict(observations(car, 2))[1])
    _, state = lqr.predict(batch)
    with pytest.raises(InputError, match=r"plan of shape \(2, .* number of environments"):
        lqr.predict(pick(batch, 0), state)
    with pytest.raises(InputError, match="what predict returned"):
        lqr.predict(batch, (np.zeros(2),))
    with pytest.raises(InputError, match="episode_start"):
        lqr.predict(batch, state, np.zeros(3, bool))


@pytest.mark.fault(
    "Policies", "an agent whose weights became NaN", "PlanningError in place of a NaN action"
)
def test_non_finite_networks_raise_a_typed_error(lqr: MPDiffuserAgent, tmp_path: Path) -> None:
    path = tmp_path / "agent.safetensors"
    lqr.save(path)
    broken = MPDiffuserAgent.load(path)
    with torch.no_grad():
        next(broken.models["planner"].parameters()).fill_(torch.nan)
    with pytest.raises(PlanningError, match="finite"):
        broken.predict(pick(observations(lqr, 1), 0))


def test_stable_baselines_evaluates_it_unmodified(agent: MPDiffuserAgent) -> None:
    env_id = {3: PENDULUM, 2: "LQR-v0", 5: "CarUMaze-v0"}[agent.parts.spaces.nx]
    fast = agent.with_options(action_chunk=8)
    short = {"max_episode_steps": 12}
    single = gym.make(env_id, **short)
    with pytest.warns(UserWarning, match="Monitor"):
        mean, _ = evaluate_policy(fast, single, n_eval_episodes=1)
    assert np.isfinite(mean)
    vector = make_vec_env(env_id, 3, env_kwargs=short)
    mean, _ = evaluate_policy(fast, vector, n_eval_episodes=4)
    assert np.isfinite(mean)


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


# --- plan -----------------------------------------------------------------------------------------


def test_plan_has_the_promised_shapes(agent: MPDiffuserAgent) -> None:
    one = pick(observations(agent, 1), 0)
    plan = agent.plan(one, num_candidates=5)
    assert plan.observations.shape == (5, 8, agent.parts.spaces.nx)
    assert plan.actions.shape == (5, 8, *agent.action_space.shape)
    assert plan.scores.shape == plan.feasible.shape == (5,)
    assert plan.scores[plan.chosen] == plan.scores[plan.feasible].max()
    assert {"sample", "rank", "total"} <= set(plan.seconds)
    low, high = agent.action_space.low, agent.action_space.high
    assert ((plan.actions >= low) & (plan.actions <= high)).all()


def test_plan_takes_one_observation(lqr: MPDiffuserAgent) -> None:
    with pytest.raises(InputError, match="one observation"):
        lqr.plan(observations(lqr, 2))


def test_inpainting_plans_one_step_less_and_keeps_x_0() -> None:
    agent = tiny_agent("LQR-v0", initial_state="inpaint", conditions=("final_state",))
    row = np.array([0.05, -0.1])
    plan = agent.plan(row, num_candidates=2)
    assert plan.observations.shape == (2, 7, 2)
    assert plan.actions.shape == (2, 7, 1)
    _, state = agent.predict(row)
    kept = agent.normalizers.observation.unnormalize(state.plan[:, 0, :2])
    np.testing.assert_allclose(kept[0], row, atol=1e-6)
