"""Collect data, train an MPDiffuser, save it, load it and control the system with it.

python examples/train_lqr.py                # about ten minutes on two cores
python examples/train_lqr.py --steps 50     # only to see it run
"""

import argparse
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np

from mpd_gym import MPDiffuserAgent, evaluate, preset, record
from mpd_gym.collect.lqr import NoisyLQR

DATASET = "examples/lqr-v0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=500)
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("outputs/examples"))
    options = parser.parse_args()

    env = gym.make("LQR-v0").unwrapped
    expert = NoisyLQR(env.optimal_gain, probability=0.4, action_space=env.action_space)
    record(expert, "LQR-v0", DATASET, episodes=options.episodes, seed=0, overwrite=True)

    config = preset("laptop", "LQR-v0")
    warmup = min(config.training.warmup_steps, options.steps // 2)
    training = replace(config.training, steps=options.steps, warmup_steps=warmup)
    folder = options.folder / f"lqr-{options.steps}"
    agent = MPDiffuserAgent.fit(DATASET, replace(config, training=training), directory=folder)
    agent.save(options.folder / "lqr.safetensors")

    agent = MPDiffuserAgent.load(options.folder / "lqr.safetensors", temperature=0.1)
    seeds = range(1_000, 1_000 + options.trials)
    found = evaluate(agent, "LQR-v0", seeds=seeds, num_envs=options.trials)
    starts = np.stack([env.reset(seed=seed)[0] for seed in seeds])
    ratio = -found.returns.mean() / env.optimal_cost(starts).mean()
    print(f"cost: {ratio:.2f} times the optimum, over {options.trials} trials")


if __name__ == "__main__":
    main()
