"""Files that ship: they are there, small, described, and drop in where an SB3 model would."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import mpd_gym
from mpd_gym.agents import load_agent
from mpd_gym.agents.serialization import shipped_agents
from mpd_gym.boundary import check_spaces
from mpd_gym.collect.sb3_zip import load_sb3
from mpd_gym.envs.image_pendulum import draw
from mpd_gym.evaluation.demo import scenes
from mpd_gym.evaluation.returns import evaluate
from mpd_gym.latent import ImageEncoder

FOLDER = Path(mpd_gym.__file__).parent / "pretrained"
EXPECTED = {"CarUMaze-v0", "ConstrainedPendulum-v0", "LQR-v0", "LatentPendulum-v0"}
SHIPPED = sorted(shipped_agents())
FILES = sorted(path.name for path in FOLDER.glob("*") if path.suffix in (".safetensors", ".zip"))
SHORT = {"max_episode_steps": 12}


def test_an_agent_ships_for_each_main_environment() -> None:
    assert set(SHIPPED) >= EXPECTED
    assert set(scenes()) == set(SHIPPED)


def test_files_are_small_and_described() -> None:
    text = (FOLDER / "README.md").read_text()
    for name in FILES:
        assert (FOLDER / name).stat().st_size < 16_000_000
        assert f"`{Path(name).stem.removesuffix('-ConstrainedPendulum-v0')}" in text


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".zip")])
def test_sb3_policies_load_and_play(name: str) -> None:
    env_id = next(env_id for env_id in EXPECTED if name.endswith(f"-{env_id}.zip"))
    policy = load_sb3(FOLDER / name, env_id)
    found = evaluate(policy, env_id, seeds=[0, 1], env_kwargs=SHORT, deterministic=True)
    assert np.isfinite(found.returns).all()


@pytest.mark.parametrize("env_id", SHIPPED)
def test_shipped_agents_fit_their_environment(env_id: str) -> None:
    env = gym.make(env_id)
    agent = load_agent(env_id, "cpu")
    check_spaces(agent, env, env_id)
    observation, _ = env.reset(seed=0)
    plan = agent.plan(observation, deterministic=True)
    assert np.isfinite(plan.actions).all() and np.isfinite(plan.observations).all()
    assert env.action_space.contains(agent.predict(observation)[0])
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("env_id", SHIPPED)
def test_evaluate_policy_of_stable_baselines_gives_our_returns(env_id: str, copies: int) -> None:
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    agent = load_agent(env_id, "cpu")
    envs = make_vec_env(env_id, n_envs=copies, seed=40, env_kwargs=SHORT)
    returns, lengths = evaluate_policy(
        agent, envs, n_eval_episodes=copies, return_episode_rewards=True
    )
    envs.close()
    found = evaluate(
        agent,
        env_id,
        seeds=range(40, 40 + copies),
        num_envs=copies,
        env_kwargs=SHORT,
        deterministic=True,
    )
    np.testing.assert_allclose(sorted(returns), sorted(found.returns), rtol=1e-4, atol=1e-4)
    assert sorted(lengths) == sorted(found.lengths)


def test_angle_and_velocity_can_be_read_from_the_shipped_encoders_latents() -> None:
    encoder = ImageEncoder.load("ImagePendulum-v0")
    rng = np.random.default_rng(0)
    angles, speeds = rng.uniform(-np.pi, np.pi, 1500), rng.uniform(-8, 8, 1500)
    past = 0.05 * np.arange(-3, 1)  # s; four frames at a constant velocity
    latents = encoder.encode(draw(angles[:, None] + speeds[:, None] * past)).astype(float)
    i, j = np.triu_indices(latents.shape[1])
    inputs = np.c_[np.ones(1500), latents, latents[:, i] * latents[:, j]]
    states = np.c_[np.cos(angles), np.sin(angles), speeds]
    square = inputs[:1200].T @ inputs[:1200] + 1e-3 * np.eye(inputs.shape[1])
    weights = np.linalg.solve(square, inputs[:1200].T @ states[:1200])
    error = np.sqrt(np.square(inputs[1200:] @ weights - states[1200:]).mean(0))
    assert error[:2].max() < 0.1 and error[2] < 0.5


def test_the_latent_pendulum_shows_the_shipped_encoders_latents() -> None:
    env, plain = gym.make("LatentPendulum-v0"), gym.make("ImagePendulum-v0")
    latent, _ = env.reset(seed=1)
    images, _ = plain.reset(seed=1)
    expected = ImageEncoder.load("ImagePendulum-v0").encode(images)
    np.testing.assert_allclose(latent, expected, atol=1e-4)
