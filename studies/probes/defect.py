"""How an agent adapts to a weak joint: Walker2d-v5 with a foot that has lost half its torque.

The studies of MPDiffuser (Table 3) and D-MPC (Table 3) on data that this package records: episodes
of a Stable-Baselines3 policy with smooth errors in its actions. MPDiffuser and D-MPC learn on the
sound walker, are played on the weak one, record 100 episodes of play there, each its own, and
fine-tune their dynamics model alone on these. Nothing was tuned on the weak walker. Data sets and
agents that are there are used again, the latter from `outputs/defect`.

Usage: ``python -m studies defect --policy sac-Walker2d-v3.zip [--steps 10000] [--finetune 2000]
[--episodes 50] [--seed 0] [--only mpdiffuser|dmpc]``; the policy is that of the RL Baselines3 Zoo.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch

from mpd_gym import load_agent
from mpd_gym.agents import agent_class
from mpd_gym.agents.dmpc import DMPCAgent
from mpd_gym.agents.mpdiffuser import MPDiffuserAgent
from mpd_gym.agents.presets import preset
from mpd_gym.collect.noisy import NoisyPolicy
from mpd_gym.collect.record import record
from mpd_gym.collect.sb3_zip import load_sb3
from mpd_gym.datasets import load_episodes
from mpd_gym.errors import DataError
from mpd_gym.evaluation.returns import evaluate
from mpd_gym.types import Policy

FOLDER = Path("outputs/defect")
SOUND, WEAK = "Walker2d-v5", "Walker2dTorqueDefect-v0"
NOISE = 0.35  # the policy then falls now and then, and returns about 3,000, not 3,900
RECORDED, PLAYED = 200, 100  # episodes
PLAY_SEED = 1_000_000
METHODS = ("mpdiffuser", "dmpc")

Factored = MPDiffuserAgent | DMPCAgent


def main() -> None:
    """Record, train, play, fine-tune, play again, and print returns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--finetune", type=int, default=2_000)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the first episode")
    parser.add_argument("--only", choices=METHODS, help="one of the two methods")
    options = parser.parse_args()
    torch.set_num_threads(1)
    starts = range(options.seed, options.seed + options.episodes)
    print(f"{options.episodes} episodes, {platform.machine()}, {torch.__version__}")
    policy = load_sb3(options.policy, SOUND)
    for env_id in (SOUND, WEAK):
        _play("recorded policy, without errors", policy, env_id, starts)
    data = _data("defect/sound-v0", NoisyPolicy(policy, gym.make(SOUND), noise=NOISE), SOUND)
    for method in (options.only,) if options.only else METHODS:
        trained = _trained(method, data, options.steps)
        for told, path in {
            "": trained,
            ", fine-tuned": _adapted(trained, options.finetune),
        }.items():
            for name, agent in _policies(_loaded(path), alone=not told).items():
                for env_id in (SOUND, WEAK):
                    _play(f"{method}{name}{told}", agent, env_id, starts)


def _policies(agent: Factored, *, alone: bool) -> dict[str, Factored]:
    if isinstance(agent, DMPCAgent) or not alone:
        return {"": agent}
    return {"": agent, ", planner alone": agent.with_options(composition="planner_only")}


def _trained(method: str, data: Any, steps: int) -> Path:
    path = FOLDER / f"{method}-{steps}.safetensors"
    if not path.exists():
        config = preset("laptop", None, method)
        config = replace(config, training=config.training.with_steps(steps))
        agent_class(method).fit(data, config, directory=path.with_suffix("")).save(path)
    return path


def _adapted(trained: Path, steps: int) -> Path:
    path = trained.with_name(f"{trained.stem}-adapted-{steps}.safetensors")
    if not path.exists():
        agent = _loaded(trained)
        play = _data(f"defect/{trained.stem}-v0", agent, WEAK, PLAYED, PLAY_SEED)
        agent.finetune_dynamics(play, steps, directory=path.with_suffix(""))
        agent.save(path)
    return path


def _loaded(path: Path) -> Factored:
    agent = load_agent(path)
    assert isinstance(agent, Factored)
    return agent


def _data(
    dataset_id: str, policy: Policy, env_id: str, episodes: int = RECORDED, seed: int = 0
) -> Any:
    try:
        return load_episodes(dataset_id, download=False)
    except DataError:
        return record(policy, env_id, dataset_id, episodes=episodes, seed=seed)


def _play(name: str, policy: Policy, env_id: str, starts: Sequence[int]) -> None:
    at_once = len(starts) if isinstance(policy, Factored) else 1
    found = evaluate(policy, env_id, seeds=starts, num_envs=at_once)
    print(
        f"{name}, {env_id}:",
        {key: str(value) for key, value in found.summary().items()},
        flush=True,
    )
