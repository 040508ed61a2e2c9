"""An environment of your own: record data with any policy, train on it, and evaluate the agent.

python examples/train_your_env.py                                  # some minutes on two cores
python examples/train_your_env.py --episodes 20 --steps 50         # only to see it run
"""

import argparse
from dataclasses import replace

import gymnasium as gym
import numpy as np

from mpd_gym import MPDiffuserAgent, evaluate, preset, record
from mpd_gym.collect.scripted import SmoothRandom


class PointMass(gym.Env):
    """Push a point to the origin of a line. Any Gymnasium environment with Boxes will do."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        """Start somewhere."""
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1.0, 1.0, 2)
        return self.state.copy(), {}

    def step(self, action):
        """Push for 0.1 s."""
        position, velocity = self.state
        velocity += 0.1 * float(np.clip(action[0], -1.0, 1.0))
        self.state = np.array([position + 0.1 * velocity, velocity])
        return self.state.copy(), -float(np.abs(self.state).sum()), False, False, {}


gym.register("PointMass-v0", f"{__name__}:PointMass", max_episode_steps=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--trials", type=int, default=20)
    options = parser.parse_args()

    wanderer = SmoothRandom(PointMass.action_space, PointMass.observation_space)
    data = record(wanderer, "PointMass-v0", "examples/point-mass-v0", episodes=options.episodes,
                  seed=0, overwrite=True)  # fmt: skip
    config = preset("laptop")
    training = replace(config.training, steps=options.steps, warmup_steps=options.steps // 10)
    config = replace(config, training=training, regressor_training=training)
    agent = MPDiffuserAgent.fit(data, config)
    agent.save("outputs/point-mass.safetensors")

    seeds = range(1_000, 1_000 + options.trials)
    for name, policy in {"data": wanderer, "agent": agent}.items():
        found = evaluate(policy, "PointMass-v0", seeds=seeds, num_envs=options.trials)
        print(f"{name}: return {found.summary()['return']}")


if __name__ == "__main__":
    main()
