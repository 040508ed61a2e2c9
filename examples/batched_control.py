"""Step a thousand environments at once, under one controller, and time it.

python examples/batched_control.py
"""

import argparse
import time

import gymnasium as gym
import numpy as np

import mpd_gym  # noqa: F401 - registers the environments
from mpd_gym.collect.scripted import PendulumSwingUp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    envs = gym.make_vec("ConstrainedPendulum-v0", num_envs=options.copies)
    controller = PendulumSwingUp(velocity_limit=6.5)
    observations, _ = envs.reset(seed=0)
    costs = np.zeros(options.copies)
    began = time.perf_counter()
    for _ in range(options.steps):
        actions, _ = controller.predict(observations)
        observations, _, _, _, infos = envs.step(actions)
        costs += infos["cost"]
    seconds = time.perf_counter() - began
    rate = options.copies * options.steps / seconds
    print(
        f"{rate:,.0f} steps/s; held up by {np.mean(infos['is_success']):.1%}, "
        f"limit broken by {np.mean(costs > 0):.1%}"
    )


if __name__ == "__main__":
    main()
