"""How good a first try is: the general laptop preset on environments that are not this package's.

Records data, trains with nothing set but the number of steps, and plays the agent, its planner
alone, that planner with as many network calls as the agent, and the policy that was recorded. The
preset's options, length of plans and batches were chosen on starts from 100000 on, and what it is
conditioned on in the maze on those from 0 on as well. Other lengths and batches say what the
preset's are worth. Mixed data have twice as many episodes more, with small and with large errors in
the policy's actions. Data sets and agents that are there are used again, the latter from
`outputs/first-try`. Tasks of MuJoCo need the zip file of a Stable-Baselines3 policy, such as SAC's
of the RL Baselines3 Zoo; the maze needs gymnasium-robotics.

Usage: ``python -m studies first-try pendulum|maze|hopper|halfcheetah|walker2d
[--policy FILE.zip] [--mixed] [--method mpdiffuser] [--steps 5000] [--horizon 8] [--batch-size 256]
[--training-seed 0] [--episodes 50] [--seed 0]``
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from mpd_gym import load_agent
from mpd_gym.agents import AGENTS, agent_class
from mpd_gym.agents.config import AgentConfig
from mpd_gym.agents.presets import preset
from mpd_gym.agents.trained import TrainedAgent
from mpd_gym.collect.noisy import NoisyPolicy
from mpd_gym.collect.record import record
from mpd_gym.collect.sb3_zip import load_sb3
from mpd_gym.collect.scripted import PendulumSwingUp
from mpd_gym.datasets import EpisodeSource, load_episodes
from mpd_gym.errors import DataError
from mpd_gym.evaluation.returns import evaluate, mean_interval
from mpd_gym.types import Array, Policy

FOLDER = Path("outputs/first-try")
METHODS = sorted(AGENTS.keys() - {"safediffuser"})  # these tasks have no limits to keep
ERRORS = (0.0, 0.35, 0.7)  # of mixed data: shares of the range of actions


@dataclass(frozen=True)
class Task:
    """An environment and its data."""

    env_id: str
    episodes: int
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)


TASKS = {
    "pendulum": Task("Pendulum-v1", 100),
    "maze": Task(
        "gymnasium_robotics:PointMaze_UMaze-v3",
        500,
        {"continuing_task": False, "reset_target": False},
    ),
    "hopper": Task("Hopper-v5", 200),
    "halfcheetah": Task("HalfCheetah-v5", 200),
    "walker2d": Task("Walker2d-v5", 200),
}


class MazeWalker:
    """Walks through the cells of PointMaze's U to the goal, with some noise."""

    cells = ((1, 1), (1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1))  # row and column, end to end

    def __init__(self) -> None:
        self.reseed(0)

    def reseed(self, seed: int) -> None:
        """Start the random numbers of an episode."""
        self._rng = np.random.default_rng(seed)

    def predict(
        self,
        observation: Mapping[str, Array],
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[Array, Any]:
        """Pull each ball towards the middle of its next cell, or the goal where that is nearer."""
        balls, goals = (np.atleast_2d(observation[key]) for key in ("observation", "desired_goal"))
        pulls = np.stack([self._pull(*pair) for pair in zip(balls, goals, strict=True)])
        single = np.ndim(observation["observation"]) == 1
        return pulls[0] if single else pulls, state

    def _pull(self, ball: Array, goal: Array) -> Array:
        here, there = self._cell(ball), self._cell(goal)
        aim = goal
        if abs(there - here) > 1:
            row, column = self.cells[here + int(np.sign(there - here))]
            aim = np.array([column - 2.0, 2.0 - row])
        pull = 10 * (aim - ball[:2]) - 2.0 * ball[2:] + 0.3 * self._rng.normal(size=2)
        return np.clip(pull, -1, 1).astype(np.float32)

    def _cell(self, place: Array) -> int:
        return self.cells.index((int(np.floor(2.5 - place[1])), int(np.floor(place[0] + 2.5))))


SCRIPTED: dict[str, Callable[[], Policy]] = {"pendulum": PendulumSwingUp, "maze": MazeWalker}


def main() -> None:
    """Record, train, play, and print returns and success."""
    options = _arguments()
    torch.set_num_threads(1)
    task, config = TASKS[options.task], _config(options)
    recorded = _policy(options.task, options.policy)
    data = [_data(options.task, recorded, share) for share in ERRORS if options.mixed or not share]
    agent = _agent(options, config, data)
    print(f"{task.env_id}, {options.episodes} episodes, {platform.machine()}, {torch.__version__}")
    for source in data:
        returns = np.array([episode.rewards.sum() for episode in source])
        print(f"{source.name}, return: {mean_interval(returns)} ({len(source)} episodes)")
    played: dict[str, Policy] = {options.method: agent}
    if options.method == "mpdiffuser":
        played["planner alone"] = agent.with_options(composition="planner_only")
        played["planner, levels twice"] = agent.with_options(composition="planner_resampled")
    played["recorded policy"] = _policy(options.task, options.policy)  # with fresh random numbers
    for name, policy in played.items():
        found = evaluate(
            policy,
            task.env_id,
            seeds=range(options.seed, options.seed + options.episodes),
            num_envs=1 if name == "recorded policy" else options.episodes,
            env_kwargs=task.env_kwargs,
        )
        print(name, {key: str(value) for key, value in found.summary().items()}, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--policy", type=Path, help="zip file of a Stable-Baselines3 policy")
    parser.add_argument("--mixed", action="store_true", help="data with and without errors")
    parser.add_argument("--method", choices=METHODS, default="mpdiffuser")
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--horizon", type=int, help="of plans; the preset's by default")
    parser.add_argument("--batch-size", type=int, help="windows a step; the preset's by default")
    parser.add_argument("--training-seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the first episode")
    return parser.parse_args()


def _policy(name: str, path: Path | None) -> Policy:
    if name in SCRIPTED:
        return SCRIPTED[name]()
    if path is None:
        raise SystemExit(f"--policy: {TASKS[name].env_id} needs the zip file of a policy")
    return load_sb3(path, TASKS[name].env_id)


def _config(options: argparse.Namespace) -> Any:
    config: Any = preset("laptop", None, options.method)
    seed = options.training_seed
    training = replace(config.training.with_steps(options.steps), seed=seed)
    if options.batch_size is not None:
        training = replace(training, batch_size=options.batch_size)
    if options.horizon is not None:
        if not hasattr(config, "horizon"):
            raise SystemExit(f"--horizon: {options.method} plans nothing; leave it out")
        config = replace(config, horizon=options.horizon)
    regressors = replace(config.regressor_training, seed=seed)
    return replace(config, seed=seed, training=training, regressor_training=regressors)


def _agent(
    options: argparse.Namespace, config: AgentConfig, data: Sequence[EpisodeSource]
) -> TrainedAgent[Any]:
    name = f"{options.task}-mixed" if options.mixed else options.task
    if options.method != "mpdiffuser":
        name += f"-{options.method}"
    training = config.training
    horizon = getattr(config, "horizon", 1)  # behaviour cloning plans nothing
    sizes = f"{training.steps}-h{horizon}-b{training.batch_size}-seed{config.seed}"
    path = FOLDER / f"{name}-{sizes}.safetensors"
    if path.exists():
        return load_agent(path)
    agent = agent_class(options.method).fit(data, config, directory=path.with_suffix(""))
    agent.save(path)
    return agent


def _data(name: str, policy: Policy, share: float) -> EpisodeSource:
    """Episodes of a task, with smooth errors in a share of the range of actions."""
    task = TASKS[name]
    dataset_id = (
        f"first-try/{name}-errors-{share * 100:.0f}-v0" if share else f"first-try/{name}-v0"
    )
    try:
        return load_episodes(dataset_id, download=False)
    except DataError:
        if share:
            env = gym.make(task.env_id, **task.env_kwargs)
            policy = NoisyPolicy(policy, env, noise=share)
        seed = round(share * 100)
        return load_episodes(
            record(
                policy,
                task.env_id,
                dataset_id,
                episodes=task.episodes,
                seed=seed,
                env_kwargs=task.env_kwargs,
            )
        )
