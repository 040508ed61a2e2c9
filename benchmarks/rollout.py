"""Plans per second of a shipped agent that plans for many environments at once.

Times are the processor's, with one thread, medians of several calls of `predict`.

Usage: ``python benchmarks/rollout.py [--agent LQR-v0] [--envs 1 16 64 250] [--steps 5]
[--repeats 5]``
"""

from __future__ import annotations

import argparse
import statistics
import time

import gymnasium as gym
import numpy as np
import torch

from mpd_gym import MPDiffuserAgent


def seconds(agent: MPDiffuserAgent, observations: object, repeats: int) -> float:
    """Median processor time of `predict`, after a call that does not count."""
    taken = []
    for _ in range(repeats + 1):
        began = time.process_time()
        agent.predict(observations)
        taken.append(time.process_time() - began)
    return statistics.median(taken[1:])


def main() -> None:
    """Time all numbers of environments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--agent", default="LQR-v0")
    parser.add_argument("--envs", type=int, nargs="+", default=[1, 16, 64, 250])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    agent = MPDiffuserAgent.load(options.agent, num_steps=options.steps)
    space = gym.make(options.agent).observation_space
    space.seed(0)
    print("envs  ms per call  ms per plan  plans/s")
    for count in options.envs:
        samples = [space.sample() for _ in range(count)]
        if isinstance(samples[0], dict):
            observations = {key: np.stack([one[key] for one in samples]) for key in samples[0]}
        else:
            observations = np.clip(np.stack(samples), -1, 1)
        whole = seconds(agent, observations, options.repeats)
        print(
            f"{count:4d} {1e3 * whole:12.1f} {1e3 * whole / count:12.3f} {count / whole:8.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
