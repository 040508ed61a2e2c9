"""Configurations and presets of an agent, and what it learns from data with them."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import PENDULUM, TINY, play, source, tiny_agent

from mpd_gym import MPDiffuserAgent, MPDiffuserConfig
from mpd_gym.agents.config import Sizes
from mpd_gym.agents.presets import preset
from mpd_gym.datasets import ConditionSpec, load_episodes
from mpd_gym.diffusion import LossConfig
from mpd_gym.errors import ConfigError
from mpd_gym.models import UnetConfig
from mpd_gym.training import TrainingConfig

# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["laptop", "paper"])
@pytest.mark.parametrize("env_id", [None, "LQR-v0", "CarUMaze-v0", PENDULUM])
def test_presets_survive_json(size: str, env_id: str | None) -> None:
    config = preset(size, env_id)
    assert MPDiffuserConfig.from_json(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizon": 30, "unet": UnetConfig()}, "horizon must be divisible by 4"),
        ({"conditions": ("returns",)}, "condition kind: .* Did you mean 'return'"),
        ({"schedule": "cosin"}, "schedule: .* Did you mean 'cosine'"),
        ({"null": "none"}, "null: expected one of"),
        ({"validation_fraction": 1.0}, "validation_fraction: expected a finite number in"),
        ({"regressor_inputs": "states"}, "regressor_inputs: expected one of"),
        ({"diffusion_steps": 0}, "diffusion_steps: expected an integer from 2"),
        ({"discount": 1.5}, "discount: expected a finite number in"),
    ],
)
def test_contradictory_configurations_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)


def test_unknown_fields_are_refused_with_the_closest() -> None:
    with pytest.raises(ConfigError, match="horizon"):
        MPDiffuserConfig.from_json({"horizn": 32})


@pytest.mark.parametrize("prediction", [None, "x0"])
def test_the_dynamics_model_may_predict_clean_states(prediction: Any, tmp_path: Path) -> None:
    config = replace(TINY, dynamics_prediction=prediction)
    agent = MPDiffuserAgent.fit(source("LQR-v0"), config, progress=False)
    told = [agent.config.loss_of(role).prediction for role in ("planner", "dynamics")]
    assert told == ["noise", prediction or "noise"]
    agent.save(tmp_path / "agent.safetensors")
    options = {"precision": "plain", "num_steps": 1, "composition": "combined_score"}
    agent = MPDiffuserAgent.load(tmp_path / "agent.safetensors", "cpu", **options)
    agent = agent.with_options(dynamics_weight=1.0, temperature=0.01)
    head = agent.models["dynamics"].unet.head[-1]
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)  # the network's output is 0
    _, state = agent.predict(np.zeros(2, np.float32))
    states = state.plan[..., :2]  # x̂_0, as one step leads from level K to 0
    assert (states == 0).all() if prediction == "x0" else (states != 0).all()
    with pytest.raises(ConfigError, match="dynamics_prediction"):
        replace(TINY, dynamics_prediction="score")


# --- training -------------------------------------------------------------------------------------


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


def test_a_learned_reward_sees_the_goal() -> None:
    """Rewards are distances to the goal: what is learned of one goal must not hold for others."""
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
    assert general.resolved(Sizes(5, 3, {"return": 1})).loss.prediction == "noise"
    assert general.resolved(Sizes(6, 3, {"return": 1})).loss.prediction == "x0"
    noise = replace(general, loss=LossConfig())
    with pytest.warns(UserWarning, match=r"of 8 columns.* 32, trajectories have 9.* to 36 or"):
        assert noise.resolved(Sizes(6, 3, {"return": 1})) == noise


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
    with pytest.warns(UserWarning, match="one episode: agents see one start"):
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


def test_training_does_not_go_on_with_data_collected_anew(tmp_path: Path) -> None:
    agent, episodes = tiny_agent("LQR-v0"), play("LQR-v0")
    anew = [replace(episode, rewards=episode.rewards - 1) for episode in episodes]
    first, second = (
        load_episodes(part, metadata=source("LQR-v0").metadata) for part in (episodes, anew)
    )
    tune = partial(agent.finetune_dynamics, steps=3, directory=tmp_path, progress=False)
    tune(first)
    with pytest.raises(
        ConfigError, match=r"identity.data\[0\].digest is .* was trained with .*resume=False"
    ):
        tune(second)
    tune(second, resume=False)


def test_dynamics_model_learns_from_its_own_data() -> None:
    first, second = source("LQR-v0"), source("LQR-v0", episodes=6)
    joint = MPDiffuserAgent.fit(first, TINY, progress=False)
    with pytest.warns(UserWarning, match="4 of 10 episodes repeat others"):
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
