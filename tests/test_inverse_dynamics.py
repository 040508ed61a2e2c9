"""Learned inverse dynamics: which actions are executed, what they learn from, files, errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import TINY, source, tiny_agent

from mpd_gym import MPDiffuserAgent
from mpd_gym.agents import (
    DecisionDiffuserAgent,
    PlannerAgent,
    SafeDiffuserAgent,
    agent_class,
)
from mpd_gym.agents.config import INVERSE_DYNAMICS
from mpd_gym.agents.presets import preset
from mpd_gym.agents.safediffuser import StateLimit
from mpd_gym.datasets import load_episodes
from mpd_gym.errors import ConfigError
from mpd_gym.training import TrainingConfig
from mpd_gym.types import Array, Episode

LQR = "LQR-v0"


def linear_episodes(count: int = 12, steps: int = 30) -> list[Episode]:
    """x' = x / 2 + u, so that the action is a linear function of both states."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        actions = rng.uniform(-1, 1, size=(steps, 2))
        states = [rng.normal(size=2)]
        for action in actions:
            states.append(states[-1] / 2 + action)
        ends = np.arange(steps) == steps - 1
        nothing = np.zeros(steps)
        found.append(Episode(np.stack(states), actions, nothing, nothing > 0, ends))
    return found


def linear_source() -> Any:
    spaces = {
        "observation_space": gym.spaces.Box(-np.inf, np.inf, (2,), np.float64),
        "action_space": gym.spaces.Box(-1.0, 1.0, (2,), np.float32),
    }
    return load_episodes(linear_episodes(), metadata=spaces)


def weights(agent: Any, role: str) -> dict[str, torch.Tensor]:
    return dict(agent.models[role].state_dict())


def same(first: Any, second: Any, role: str) -> bool:
    ours, theirs = weights(first, role), weights(second, role)
    return all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def plain() -> MPDiffuserAgent:
    return tiny_agent()


@pytest.fixture(scope="module")
def inverse(plain: MPDiffuserAgent) -> MPDiffuserAgent:
    return plain.with_inverse_dynamics(source(LQR), progress=False)


def start() -> Array:
    observation, _ = gym.make(LQR).reset(seed=3)
    return np.asarray(observation)


def test_actions_are_those_between_planned_states(
    plain: MPDiffuserAgent, inverse: MPDiffuserAgent
) -> None:
    states = inverse.normalizers.observation
    plan = inverse.plan(start(), num_candidates=3, deterministic=True)
    after = torch.as_tensor(states.normalize(plan.observations), dtype=torch.float32)
    first = torch.as_tensor(states.normalize(start()), dtype=torch.float32).expand(3, 1, -1)
    with torch.no_grad():
        found = inverse.models[INVERSE_DYNAMICS](torch.cat((first, after[:, :-1]), 1), after)
    actions = inverse.normalizers.action.unnormalize(found.numpy())
    np.testing.assert_allclose(plan.actions, np.clip(actions, -10, 10), atol=1e-5)

    own = inverse.with_options(actions="planned").plan(start(), 3, deterministic=True)
    usual = plain.plan(start(), 3, deterministic=True)
    np.testing.assert_array_equal(own.actions, usual.actions)
    np.testing.assert_array_equal(own.observations, plan.observations)
    assert not np.allclose(own.actions, plan.actions)


def test_each_environment_has_its_own_actions(inverse: MPDiffuserAgent) -> None:
    batch = np.stack([start(), -start()])
    agent = inverse.with_options(num_candidates=3, samples_per_candidate=2)
    together, _ = agent.predict(batch, deterministic=True)
    for row, action in zip(batch, together, strict=True):
        alone, _ = agent.predict(row, deterministic=True)
        np.testing.assert_allclose(alone, action, atol=1e-4)


def test_the_callers_function_comes_last(inverse: MPDiffuserAgent) -> None:
    agent = inverse.with_options()
    learned = agent.plan(start(), deterministic=True).actions
    agent.set_inverse_dynamics(lambda x, u, y: u / 2)
    np.testing.assert_allclose(agent.plan(start(), deterministic=True).actions, learned / 2)


def test_nothing_else_changes(plain: MPDiffuserAgent, inverse: MPDiffuserAgent) -> None:
    assert INVERSE_DYNAMICS not in plain.models and not plain.config.inverse_dynamics
    assert all(same(plain, inverse, role) for role in plain.models)
    assert inverse.history[INVERSE_DYNAMICS]["steps"] == TINY.regressor_training.steps


def test_it_is_what_a_training_from_the_start_makes(inverse: MPDiffuserAgent) -> None:
    again = tiny_agent(inverse_dynamics=True)
    assert all(same(again, inverse, role) for role in inverse.models)


def test_it_learns_from_the_planners_data() -> None:
    first = source(LQR)
    config = replace(TINY, inverse_dynamics=True)
    other = [first, first.select([0, 1])]  # of the same range, so that normalisers are the same
    usual = MPDiffuserAgent.fit(first, config, progress=False)
    with pytest.warns(UserWarning, match="2 of 6 episodes repeat others"):
        apart = MPDiffuserAgent.fit(first, config, dynamics_dataset=other, progress=False)
    assert same(usual, apart, INVERSE_DYNAMICS) and not same(usual, apart, "dynamics")


def test_files_keep_it(inverse: MPDiffuserAgent, tmp_path: Path) -> None:
    path = tmp_path / "agent.safetensors"
    inverse.with_options(actions="inverse_dynamics").save(path)
    again = MPDiffuserAgent.load(path)
    assert again.options.actions == INVERSE_DYNAMICS
    ours, theirs = (agent.predict(start(), deterministic=True)[0] for agent in (inverse, again))
    np.testing.assert_array_equal(ours, theirs)


def test_an_agent_without_it_refuses(plain: MPDiffuserAgent) -> None:
    with pytest.raises(ConfigError, match="has learned no inverse_dynamics"):
        plain.with_options(actions="inverse_dynamics")
    with pytest.raises(ConfigError, match="actions"):
        plain.with_options(actions="guessed")


def test_agents_of_another_ones_planner_have_it(inverse: MPDiffuserAgent) -> None:
    safe = SafeDiffuserAgent.of(inverse, limits=[StateLimit(0, -50.0, 50.0)])
    for agent in (PlannerAgent.of(inverse), safe):
        assert same(agent, inverse, INVERSE_DYNAMICS)
        action, _ = agent.predict(start())
        assert np.isfinite(action).all()


@pytest.mark.parametrize("name", ["diffuser", "dmpc", "decision_diffuser"])
def test_every_diffusion_agent_can_learn_it(name: str) -> None:
    names = {"unet", "diffusion_steps", "training", "regressor_training", "horizon"}
    changes = {key: getattr(TINY, key) for key in names}
    config: Any = replace(preset("laptop", LQR, name), inverse_dynamics=True, **changes)
    config = replace(config, sampling=replace(config.sampling, num_steps=2))
    agent = agent_class(name).fit(source(LQR), config, progress=False)
    assert INVERSE_DYNAMICS in agent.models and agent.history[INVERSE_DYNAMICS]["steps"] == 20
    action, _ = agent.predict(start())
    assert np.isfinite(action).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", [MPDiffuserAgent, DecisionDiffuserAgent])
def test_inverse_dynamics_are_exact_on_linear_data(method: Any) -> None:
    settings = TrainingConfig(
        steps=1_500, batch_size=64, learning_rate=3e-3, schedule="cosine", validation_batches=1
    )
    names = ("horizon", "unet", "diffusion_steps", "training", "validation_fraction")
    config = method.config_type(
        **{name: getattr(TINY, name) for name in names},
        regressor_training=settings,
        inverse_dynamics=True,
        inverse_hidden=(64,),
    )
    agent = method.fit(linear_source(), config, progress=False)
    episode = linear_episodes()[3]
    z = agent.normalizers.observation.normalize(episode.observations)
    rows = torch.as_tensor(z, dtype=torch.float32)
    with torch.no_grad():
        found = agent.models[INVERSE_DYNAMICS](rows[:-1], rows[1:]).numpy()
    actions = agent.normalizers.action.unnormalize(found)
    assert np.abs(actions - episode.actions).mean() < 0.03
