"""What every agent of the registry promises, and what makes each peer."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import TINY, pick, play, source, stacked, tiny_agent
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from torch import Tensor

import mpd_gym
from mpd_gym import agents
from mpd_gym.agents import (
    AGENTS,
    BehaviorCloningAgent,
    DMPCAgent,
    PlannerAgent,
    SafeDiffuserAgent,
    StateLimit,
    agent_class,
    load_agent,
)
from mpd_gym.agents.behavior_cloning import BehaviorCloningConfig
from mpd_gym.agents.config import AgentConfig
from mpd_gym.agents.decision_diffuser import DecisionDiffuserConfig
from mpd_gym.agents.diffuser import DiffuserConfig
from mpd_gym.agents.planner import PlannerConfig
from mpd_gym.agents.presets import preset
from mpd_gym.agents.safediffuser import SafeDiffuserConfig
from mpd_gym.agents.trained import TrainedAgent
from mpd_gym.datasets import cost_at_most, load_episodes
from mpd_gym.diffusion import SafetyConfig
from mpd_gym.errors import CheckpointError, ConfigError, DataError, InputError
from mpd_gym.models import UnetConfig
from mpd_gym.training import TrainingConfig
from mpd_gym.types import Episode

LQR, CAR, PENDULUM = "LQR-v0", "CarUMaze-v0", "ConstrainedPendulum-v0"
CONDITIONS = {LQR: ("final_state",), CAR: ("goal",), PENDULUM: ("return",)}
LIMITS = {
    LQR: (StateLimit(0, high=0.05),),
    CAR: (StateLimit(0, low=-0.5, high=0.5),),
    PENDULUM: (StateLimit(2, low=-1.0, high=1.0),),
}
CASES = [(name, env_id) for name in sorted(AGENTS) for env_id in CONDITIONS]
COMMON = {
    name: getattr(TINY, name)
    for name in ("training", "regressor_training", "sampling", "validation_fraction")
}
DIFFUSION = {name: getattr(TINY, name) for name in ("horizon", "unet", "diffusion_steps")}


def tiny_config(name: str, env_id: str, **changes: Any) -> AgentConfig:
    kind = agent_class(name).config_type
    values: dict[str, Any] = {**COMMON, "conditions": CONDITIONS[env_id]}
    if name != "behavior_cloning":
        values |= DIFFUSION
    if name == "safediffuser":
        values["limits"] = LIMITS[env_id]
    return kind(**{**values, **changes})


def fitted(name: str, env_id: str, **changes: Any) -> TrainedAgent[Any]:
    agent = agent_class(name).fit(
        source(env_id), tiny_config(name, env_id, **changes), progress=False
    )
    origin = {"final_state": (0.0, 0.0)} if env_id == LQR else {}
    return agent.with_options(condition_values=origin)


_CACHE: dict[tuple[str, str], TrainedAgent[Any]] = {}


def trained(name: str, env_id: str) -> TrainedAgent[Any]:
    if (name, env_id) not in _CACHE:
        _CACHE[name, env_id] = fitted(name, env_id)
    return _CACHE[name, env_id].with_options()


def observations(env_id: str, count: int) -> Any:
    env = gym.make(env_id)
    rows = [env.reset(seed=seed)[0] for seed in range(count)]
    env.close()
    return stacked(rows)


def weights(agent: TrainedAgent[Any]) -> dict[str, Tensor]:
    return {
        f"{role}/{name}": tensor
        for role, model in agent.models.items()
        for name, tensor in model.state_dict().items()
    }


# --- promises of every agent ---------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_general_conditions_suit_goal_tasks(name: str) -> None:
    """The goal is seen; a return is there only where the method needs one as its value."""
    agent = fitted(name, CAR, conditions=preset("laptop", None, name).conditions)
    expected = {"goal", "return"} if name == "dmpc" else {"goal"}
    assert set(agent.conditions.sizes) == expected
    observation = pick(observations(CAR, 1), 0)
    assert np.isfinite(agent.predict(observation)[0]).all()


def test_registered_names_are_those_of_the_classes() -> None:
    for name in AGENTS:
        kind = agent_class(name)
        assert kind.name == name
        assert issubclass(kind.config_type, AgentConfig)
        assert getattr(agents, kind.__name__) is kind
        assert getattr(agents, kind.config_type.__name__) is kind.config_type


def test_unknown_agents_are_refused_with_the_closest() -> None:
    with pytest.raises(ConfigError, match="mpdiffuser"):
        agent_class("mpdifuser")


@pytest.mark.parametrize(("name", "env_id"), CASES)
def test_one_many_and_deterministic_actions_agree(name: str, env_id: str) -> None:
    agent = trained(name, env_id)
    batch = observations(env_id, 3)
    together, state = agent.predict(batch, deterministic=True)
    assert together.shape == (3, *agent.action_space.shape)
    assert all(agent.action_space.contains(row) for row in together)
    alone = [agent.predict(pick(batch, row), deterministic=True)[0] for row in range(3)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    again, _ = agent.predict(batch, state, np.ones(3, bool), True)
    np.testing.assert_allclose(again, together, atol=1e-6)  # a reset forgets


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_resets_touch_one_environment_only(name: str) -> None:
    agent = trained(name, PENDULUM)
    if name != "behavior_cloning":
        agent = agent.with_options(action_chunk=3, warm_start_steps=2)
    batch = observations(PENDULUM, 3)
    together: Any = None
    alone: list[Any] = [None] * 3
    for flags in np.random.default_rng(0).random((5, 3)) < 0.3:
        actions, together = agent.predict(batch, together, flags, True)
        for row in range(3):
            action, alone[row] = agent.predict(
                pick(batch, row), alone[row], flags[row : row + 1], True
            )
            np.testing.assert_allclose(actions[row], action, atol=1e-5)


@pytest.mark.parametrize(("name", "env_id"), CASES)
def test_plans_have_one_shape_and_show_what_is_executed(name: str, env_id: str) -> None:
    agent = trained(name, env_id)
    one = pick(observations(env_id, 1), 0)
    plan = agent.plan(one, num_candidates=3, deterministic=True)
    nx, nu = agent.parts.spaces.nx, agent.parts.spaces.nu
    assert plan.observations.shape == (3, agent.horizon, nx)
    assert plan.actions.shape == (3, agent.horizon, nu)
    assert np.isfinite(plan.observations).all() and np.isfinite(plan.actions).all()
    single = agent.plan(one, deterministic=True)
    action, state = agent.predict(one, deterministic=True)
    np.testing.assert_allclose(action, single.actions[0, 0].reshape(action.shape), atol=1e-5)
    planned, controls = agent.planned(state)
    np.testing.assert_allclose(planned[0], single.observations[0], atol=1e-5)
    np.testing.assert_allclose(controls[0], single.actions[0], atol=1e-5)


@pytest.mark.parametrize(("name", "env_id"), CASES)
def test_a_file_restores_the_agent_whatever_its_method(
    name: str, env_id: str, tmp_path: Path
) -> None:
    path = tmp_path / "agent.safetensors"
    agent = trained(name, env_id).with_options(temperature=0.3)
    agent.save(path)
    for loaded in (load_agent(path), mpd_gym.load_agent(path), agent_class(name).load(path)):
        assert type(loaded) is agent_class(name)
        assert loaded.config == replace(agent.config, sampling=agent.options)
        assert loaded.options == agent.options
        assert loaded.history == agent.history
        batch = observations(env_id, 2)
        np.testing.assert_array_equal(
            loaded.predict(batch, deterministic=True)[0],
            agent.predict(batch, deterministic=True)[0],
        )


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_damaged_pickled_and_foreign_files_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "agent.safetensors"
    trained(name, PENDULUM).save(path)
    whole = path.read_bytes()
    other = next(entry for entry in sorted(AGENTS) if entry != name)
    with pytest.raises(CheckpointError, match=f"{name}.*load_agent"):
        agent_class(other).load(path)
    for content in (whole[:100], whole[:-1], pickle.dumps({"weights": 1})):
        path.write_bytes(content)
        for load in (load_agent, agent_class(name).load):
            with pytest.raises(CheckpointError):
                load(path)


def test_agents_of_other_versions_are_named(tmp_path: Path) -> None:
    from mpd_gym.checkpoint import load_file, save_file

    path = tmp_path / "agent.safetensors"
    trained("behavior_cloning", LQR).save(path)
    tensors, header = load_file(path, kind="agent")
    plain = {
        key: value
        for key, value in header.items()
        if key not in ("format_version", "kind", "package_version")
    }
    save_file(path, tensors, {**plain, "agent": "oracle"}, kind="agent")
    with pytest.raises(CheckpointError, match=r"oracle.*this version has"):
        load_agent(path)


@pytest.mark.parametrize("name", sorted(AGENTS))
@pytest.mark.filterwarnings("ignore:Evaluation environment is not wrapped")
def test_stable_baselines_evaluates_it(name: str) -> None:
    agent = trained(name, CAR)
    if name != "behavior_cloning":
        agent = agent.with_options(action_chunk=7)
    short = {"max_episode_steps": 8}
    for env in (gym.make(CAR, **short), make_vec_env(CAR, 2, env_kwargs=short)):
        mean, _ = evaluate_policy(agent, env, n_eval_episodes=2)
        assert np.isfinite(mean)
        env.close()


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_presets_share_data_and_training_and_survive_json(name: str) -> None:
    shared = ["normalizer", "padding", "discount", "seed"]
    if name != "behavior_cloning":
        shared += ["horizon", "unet", "diffusion_steps", "training", "schedule"]
    for size, env_id in itertools.product(("laptop", "paper"), (None, *CONDITIONS)):
        config, ours = preset(size, env_id, name), preset(size, env_id)
        assert type(config).from_json(json.loads(json.dumps(asdict(config)))) == config
        assert config.training.steps == ours.training.steps
        for field in shared:
            assert getattr(config, field) == getattr(ours, field)


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_configurations_of_other_agents_are_refused(name: str) -> None:
    other = next(entry for entry in sorted(AGENTS) if entry != name)
    with pytest.raises(ConfigError, match=agent_class(name).config_type.__name__):
        agent_class(name).fit(source(LQR), tiny_config(other, LQR), progress=False)


@pytest.mark.parametrize("name", sorted(set(AGENTS) - {"mpdiffuser", "behavior_cloning"}))
def test_compositions_with_a_dynamics_model_are_refused(name: str) -> None:
    agent = trained(name, PENDULUM)
    assert agent.options.composition == "planner_only"
    agent.with_options(composition="planner_resampled")
    with pytest.raises(ConfigError, match=r"composition: .*planner_only"):
        agent.with_options(composition="alternating")


SCRIPT = """
import sys
import test_peers
from helpers import source
from mpd_gym.agents import agent_class
name, folder = sys.argv[1:]
config = test_peers.tiny_config(name, "LQR-v0", training=test_peers.LONG)
agent_class(name).fit(source("LQR-v0"), config, directory=folder, progress=False)
"""
LONG = TrainingConfig(steps=3_000, batch_size=8, checkpoint_every=20, validation_batches=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["behavior_cloning", "dmpc"])
def test_a_killed_training_goes_on_to_the_same_weights(name: str, tmp_path: Path) -> None:
    short = replace(LONG, steps=200)
    folder = tmp_path / "killed"
    paths = os.pathsep.join((str(Path(__file__).parent), *sys.path))
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, name, str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not list(folder.rglob("*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    config = tiny_config(name, LQR, training=short)
    resumed = agent_class(name).fit(source(LQR), config, directory=folder, progress=False)
    straight = agent_class(name).fit(source(LQR), config, progress=False)
    for key, tensor in weights(straight).items():
        assert torch.equal(tensor, weights(resumed)[key]), key


@pytest.mark.slow
def test_training_in_two_processes_gives_the_same_weights() -> None:
    data, config = source(LQR), tiny_config("dmpc", LQR)
    apart = DMPCAgent.fit(data, config, progress=False)
    together = DMPCAgent.fit(data, config, progress=False, parallel=True)
    for key, tensor in weights(apart).items():
        assert torch.equal(tensor, weights(together)[key]), key


@pytest.mark.parametrize("name", sorted(set(AGENTS) - {"behavior_cloning"}))
def test_every_diffusion_agent_keeps_to_a_time(name: str) -> None:
    fast = trained(name, PENDULUM).with_options(latency_budget=30.0)
    assert fast.latency is not None
    assert fast.predict(pick(observations(PENDULUM, 1), 0))[0].shape == (1,)


# --- planner and SafeDiffuser --------------------------------------------------------------------


def test_the_planner_alone_is_mpdiffusers_planner() -> None:
    ours = tiny_agent(LQR, conditions=("return",), reward_model=True)
    ours.set_ranker("first")
    alone = PlannerAgent.of(ours)
    assert set(alone.models) == {"planner", "reward"}
    assert alone.models["planner"] is ours.models["planner"]
    batch = observations(LQR, 3)
    expected, _ = ours.with_options(composition="planner_only").predict(batch, deterministic=True)
    np.testing.assert_array_equal(alone.predict(batch, deterministic=True)[0], expected)
    trained_alone = PlannerAgent.fit(
        source(LQR),
        PlannerConfig(**{**COMMON, **DIFFUSION}, conditions=("return",)),
        progress=False,
    )
    for key, tensor in trained_alone.models["planner"].state_dict().items():
        assert torch.equal(tensor, ours.models["planner"].state_dict()[key])


def test_resampling_calls_the_planner_twice_at_each_level(monkeypatch: Any) -> None:
    agent = trained("planner", PENDULUM)
    levels: list[int] = []
    bound = agent._denoiser

    def counted(*args: Any) -> Any:
        denoise = bound(*args)
        return lambda trajectory, k: (levels.append(k), denoise(trajectory, k))[1]

    monkeypatch.setattr(agent, "_denoiser", counted)
    one = pick(observations(PENDULUM, 1), 0)
    for composition, times in (("planner_only", 1), ("planner_resampled", 2)):
        levels.clear()
        agent.with_options(composition=composition).predict(one)
        assert levels == [k for k in range(6, 0, -1) for _ in range(times)]


def test_planned_states_keep_to_limits_in_environment_units() -> None:
    agent = trained("safediffuser", PENDULUM)
    free = PlannerAgent.of(agent)
    one = pick(observations(PENDULUM, 1), 0)
    speeds = free.plan(one, num_candidates=16, deterministic=True).observations[..., 2]
    assert np.abs(speeds).max() > 1.0, "the limit would bind"
    for variant in ("robust", "relaxed", "time_varying"):
        safe = agent.with_safety(variant=variant)
        found = safe.plan(one, num_candidates=16, deterministic=True).observations[..., 2]
        assert np.abs(found).max() <= 1.0 + 1e-5
    wide = agent.with_safety(limits=[StateLimit(2, low=-99.0, high=99.0)])
    same = wide.plan(one, num_candidates=16, deterministic=True).observations[..., 2]
    np.testing.assert_allclose(same, speeds, atol=1e-5)


@pytest.mark.parametrize("normalizer", ["minmax", "cdf"])
def test_a_callers_constraint_is_on_environment_units(normalizer: str) -> None:
    ours = tiny_agent(PENDULUM, normalizer=normalizer)
    seen: list[Tensor] = []

    def slow(states: Tensor) -> Tensor:
        seen.append(states.detach())
        return 1.5 - states[..., 2].square()

    agent = SafeDiffuserAgent.of(ours, constraint=slow)
    one = pick(observations(PENDULUM, 1), 0)
    plan = agent.plan(one, num_candidates=8, deterministic=True)
    assert (plan.observations[..., 2] ** 2 <= 1.5 + 1e-3).all()
    final = seen[-1].reshape(-1, 3).numpy()
    free = PlannerAgent.of(ours).plan(one, num_candidates=8, deterministic=True)
    assert (free.observations[..., 2] ** 2 > 1.5).any()
    assert np.abs(final[:, :2]).max() < 2.0, "cosine and sine, not normalised entries"


def test_constraints_need_to_be_there_and_right(tmp_path: Path) -> None:
    ours = tiny_agent(PENDULUM)
    one = pick(observations(PENDULUM, 1), 0)
    agent = SafeDiffuserAgent.of(ours)
    with pytest.raises(ConfigError, match="set_constraint"):
        agent.predict(one)
    agent.set_constraint(lambda states: torch.zeros(3))
    with pytest.raises(InputError, match="constraint"):
        agent.predict(one)
    agent.set_constraint(lambda states: states.detach()[..., 0])
    with pytest.raises(InputError, match="gradients"):
        agent.predict(one)
    assert agent.has_caller_functions
    with pytest.warns(UserWarning, match="constraint"):
        agent.save(tmp_path / "agent.safetensors")
    with pytest.raises(ConfigError, match="3 entries"):
        agent.with_safety(limits=[StateLimit(3, high=1.0)])
    with pytest.raises(ConfigError, match="variant"):
        agent.with_safety(varian="robust")
    with pytest.raises(InputError, match="planner like MPDiffuser's"):
        SafeDiffuserAgent.of(trained("diffuser", PENDULUM))


def test_limits_travel_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "agent.safetensors"
    agent = trained("safediffuser", PENDULUM).with_safety(variant="relaxed", margin=0.1)
    agent.save(path)
    loaded = SafeDiffuserAgent.load(path)
    assert loaded.config.limits == LIMITS[PENDULUM]
    assert loaded.config.safety == SafetyConfig("relaxed", margin=0.1)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (({"index": 0},), "finite low or high"),
        (({"index": 0, "low": 1.0, "high": 0.0},), "low < high"),
        (({"index": -1, "low": 1.0},), "index"),
        (({"index": 0, "low": 1.0}, {"index": 0, "high": 2.0}), "one for each entry"),
        (({"index": 0, "lower": 1.0},), "low"),
    ],
)
def test_wrong_limits_are_refused(limits: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SafeDiffuserConfig(limits=limits)


# --- Diffuser ------------------------------------------------------------------------------------


def test_diffuser_inpaints_x_0_and_the_goal_in_every_row() -> None:
    agent = trained("diffuser", CAR)
    batch = observations(CAR, 2)
    _, state = agent.predict(batch)
    x = agent.normalizers.observation.normalize(batch["observation"])
    goal = agent.conditions.encode("goal", batch["desired_goal"])
    assert state.plan.shape == (2, 8, 5 + 2 + 2)
    np.testing.assert_allclose(state.plan[:, 0, :5], x, atol=1e-6)
    np.testing.assert_allclose(state.plan[:, :, 5:7], np.repeat(goal[:, None], 8, 1), atol=1e-6)
    moved = {**batch, "desired_goal": batch["desired_goal"] + 1.0}
    assert (agent.predict(moved)[1].plan[..., :5] != state.plan[..., :5]).any()


def test_diffuser_needs_a_value_for_what_it_inpaints() -> None:
    agent = fitted("diffuser", LQR).with_options(condition_values={})
    with pytest.raises(ConfigError, match="final_state"):
        agent.predict(np.zeros(2))


def test_value_guidance_raises_the_predicted_value_and_x_0_stays() -> None:
    agent = trained("diffuser", PENDULUM).with_options(temperature=1.0)
    one = pick(observations(PENDULUM, 1), 0)
    assert set(agent.models) == {"planner", "value"}
    scaling = agent.conditions.scalings["return"]
    values = {}
    for strength in (0.0, 30.0):
        scaled = agent.with_options(guidance_scale=strength / (scaling.high - scaling.low))
        plan = scaled.plan(one, num_candidates=32, deterministic=True)
        assert plan.returns is not None
        assert plan.chosen == plan.returns.argmax()  # ranked by the value, there is no reward
        values[strength] = plan.returns.mean()
        _, state = scaled.predict(one)
        start = agent.normalizers.observation.unnormalize(state.plan[0, 0, :3])
        np.testing.assert_allclose(start, one, atol=1e-5)
    assert values[30.0] > values[0.0]


def test_diffuser_ranks_by_a_reward_where_there_is_one() -> None:
    agent = trained("diffuser", PENDULUM)
    agent.set_reward(lambda x, u, y: -np.abs(u[..., 0]))
    plan = agent.plan(pick(observations(PENDULUM, 1), 0), num_candidates=8)
    assert plan.returns is not None
    assert plan.chosen == np.argmin(np.abs(plan.actions[..., 0]) @ (0.997 ** np.arange(7)))


@pytest.mark.parametrize(
    "conditions", [("cost",), ("return", {"kind": "return", "name": "second"})]
)
def test_diffuser_refuses_conditions_it_has_no_way_to_follow(conditions: Any) -> None:
    with pytest.raises(ConfigError, match="one 'return' at most"):
        DiffuserConfig(conditions=conditions)


# --- Decision Diffuser ---------------------------------------------------------------------------


def read_off(agent: TrainedAgent[Any], *states: Any) -> Any:
    """What learned inverse dynamics say of two normalised states."""
    pair = (torch.as_tensor(one, dtype=torch.float32) for one in states)
    with torch.no_grad():
        actions = agent.models["inverse_dynamics"](*pair).numpy()
    box = agent.action_space
    assert isinstance(box, gym.spaces.Box)
    return np.clip(agent.normalizers.action.unnormalize(actions), box.low, box.high)


def test_decision_diffuser_takes_its_actions_from_pairs_of_planned_states() -> None:
    agent = trained("decision_diffuser", LQR)
    batch = observations(LQR, 2)
    actions, state = agent.predict(batch, deterministic=True)
    assert state.plan.shape == (2, 8, 2), "states alone are diffused"
    x = agent.normalizers.observation.normalize(batch)
    np.testing.assert_allclose(state.plan[:, 0], x, atol=1e-6)
    np.testing.assert_allclose(
        actions, read_off(agent, *state.plan[:, :2].swapaxes(0, 1)), atol=1e-5
    )


def test_decision_diffuser_can_be_told_its_initial_state(tmp_path: Path) -> None:
    agent = fitted("decision_diffuser", LQR, initial_state="film")
    assert agent.horizon == trained("decision_diffuser", LQR).horizon + 1
    batch = observations(LQR, 2)
    actions, state = agent.predict(batch, deterministic=True)
    x = agent.normalizers.observation.normalize(batch)
    np.testing.assert_allclose(actions, read_off(agent, x, state.plan[:, 0]), atol=1e-5)
    agent.save(tmp_path / "told.safetensors")
    loaded = load_agent(tmp_path / "told.safetensors")
    np.testing.assert_array_equal(loaded.predict(batch, deterministic=True)[0], actions)


def test_decision_diffuser_predicts_the_clean_states_and_is_guided() -> None:
    assert DecisionDiffuserConfig().loss.prediction == "x0"
    agent = trained("decision_diffuser", PENDULUM)
    one = pick(observations(PENDULUM, 1), 0)
    plans = [
        agent.with_options(guidance_scale=scale).plan(one, deterministic=True).observations
        for scale in (1.0, 3.0)
    ]
    assert (plans[0] != plans[1]).any()


def test_decision_diffuser_has_no_other_actions() -> None:
    with pytest.raises(ConfigError, match="plans states alone"):
        DecisionDiffuserConfig(inverse_dynamics=False)
    with pytest.raises(ConfigError, match="plans states alone"):
        trained("decision_diffuser", LQR).with_options(actions="planned")


# --- behaviour cloning ---------------------------------------------------------------------------


def controlled(gain: float, cost: float, count: int = 6) -> list[Episode]:
    """Episodes of u = gain · (goal − x) on x' = x + 0.1 u, each with one cost at its first step."""
    rng = np.random.default_rng(int(10 * gain))
    found = []
    for _ in range(count):
        goal = rng.uniform(-1, 1, size=1)
        states, actions = [rng.uniform(-1, 1, size=1)], []
        for _ in range(20):
            actions.append(np.clip(gain * (goal - states[-1]), -1, 1))
            states.append(states[-1] + 0.1 * actions[-1])
        ends = np.arange(20) == 19
        seen = {"observation": np.stack(states), "desired_goal": np.tile(goal, (21, 1))}
        costs = cost * (np.arange(20) == 0)
        nothing = np.zeros(20)
        found.append(Episode(seen, np.stack(actions), nothing, nothing > 0, ends, costs))
    return found


def controlled_source(episodes: list[Episode]) -> Any:
    box = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    spaces = {
        "observation_space": gym.spaces.Dict({"observation": box, "desired_goal": box}),
        "action_space": gym.spaces.Box(-1.0, 1.0, (1,), np.float32),
    }
    return load_episodes(episodes, metadata=spaces)


CLONING = BehaviorCloningConfig(
    conditions=("goal",),
    hidden=(32, 32),
    training=TrainingConfig(
        steps=800, batch_size=64, learning_rate=5e-3, schedule="cosine", validation_batches=1
    ),
    regressor_training=TrainingConfig(
        steps=400, batch_size=64, learning_rate=5e-3, validation_batches=1
    ),
    validation_fraction=0.0,
)


def test_cloning_reproduces_a_controller_with_its_goal_and_one_step_ahead() -> None:
    data = controlled_source(controlled(0.5, cost=0.0, count=12))
    agent = BehaviorCloningAgent.fit(data, CLONING, progress=False)
    x, goal = np.array([[-0.5], [0.1], [0.6]]), np.array([[0.4], [-0.3], [0.5]])
    seen = {"observation": x, "desired_goal": goal}
    actions, _ = agent.predict(seen)
    np.testing.assert_allclose(actions, 0.5 * (goal - x), atol=0.06)
    np.testing.assert_array_equal(actions, agent.predict(seen)[0])
    plan = agent.plan(pick(seen, 0))
    assert plan.observations.shape == (1, 1, 1)
    np.testing.assert_allclose(plan.observations[0, 0], x[0] + 0.1 * plan.actions[0, 0], atol=0.05)


def test_cloning_safe_episodes_only_follows_them() -> None:
    data = controlled_source(controlled(0.2, cost=0.0) + controlled(1.0, cost=2.0))
    safe = data.where(cost_at_most(0.0))
    assert (len(data), len(safe)) == (12, 6)
    assert safe.name != data.name, "or a training on one would resume with the other"
    seen = {"observation": np.array([0.5]), "desired_goal": np.array([-0.3])}
    action, _ = BehaviorCloningAgent.fit(safe, CLONING, progress=False).predict(seen)
    assert float(action[0]) == pytest.approx(0.2 * -0.8, abs=0.05)
    everything, _ = BehaviorCloningAgent.fit(data, CLONING, progress=False).predict(seen)
    assert float(everything[0]) < -0.3


def test_selections_read_in_order_and_refuse_to_be_empty() -> None:
    data = controlled_source(controlled(0.2, 1.0, count=3) + controlled(0.2, 3.0, count=3))
    kept = data.where(cost_at_most(2.0))
    np.testing.assert_array_equal(kept[1].actions, data[1].actions)
    with pytest.raises(DataError, match="none of the 6"):
        data.where(cost_at_most(0.5))
    with pytest.raises(InputError, match="no costs"):
        source(LQR).where(cost_at_most(0.0))


def test_cloning_has_no_levels_chunks_or_warm_starts() -> None:
    agent = trained("behavior_cloning", PENDULUM)
    for option in ({"num_steps": 2}, {"warm_start_steps": 1}):
        with pytest.raises(ConfigError, match="0 diffusion levels"):
            agent.with_options(**option)
    with pytest.raises(ConfigError, match="1 actions"):
        agent.with_options(action_chunk=2)
    with pytest.raises(ConfigError, match="no reverse steps"):
        agent.with_options(latency_budget=0.1)


def test_cloning_needs_the_values_of_its_inputs() -> None:
    agent = fitted("behavior_cloning", LQR).with_options(condition_values={})
    with pytest.raises(ConfigError, match="final_state"):
        agent.predict(np.zeros(2))


def test_peers_learn_from_played_episodes_with_costs() -> None:
    agent = PlannerAgent.fit(
        load_episodes(play(PENDULUM), metadata=source(PENDULUM).metadata),
        PlannerConfig(
            **{**COMMON, **DIFFUSION, "unet": UnetConfig(width=8, multipliers=(1,), groups=4)},
            cost_model=True,
            reward_model=True,
        ),
        progress=False,
    ).with_options(budget=1.0, num_candidates=4)
    plan = agent.plan(pick(observations(PENDULUM, 1), 0))
    assert plan.costs is not None and plan.returns is not None
