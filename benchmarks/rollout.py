"""Plans per second of a shipped agent that plans for many environments at once.

Beside the whole of `predict`, the reverse steps alone are shown: what a rollout loses to reading,
ranking and writing. Times are the processor's, with one thread, medians of several calls. Usage:
``python benchmarks/rollout.py [--agent LQR-v0] [--envs 1 16 64 250] [--steps 5] [--repeats 5]``
"""

from __future__ import annotations

import argparse
import statistics
import time

import gymnasium as gym
import numpy as np
import torch

from mpd_gym import MPDiffuserAgent


def seconds(agent: MPDiffuserAgent, observations: object, repeats: int) -> tuple[float, float]:
    """Median processor time of `predict`, and its share in the reverse pass."""
    whole, sampling = [], []
    sample = agent._sample

    def timed(request: object) -> torch.Tensor:
        began = time.process_time()
        found = sample(request)
        sampling.append(time.process_time() - began)
        return found

    agent._sample = timed
    for _ in range(repeats + 1):
        began = time.process_time()
        agent.predict(observations)
        whole.append(time.process_time() - began)
    agent._sample = sample
    return statistics.median(whole[1:]), statistics.median(sampling[1:])


def main() -> None:
    """Time all numbers of environments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agent", default="LQR-v0")
    parser.add_argument("--envs", type=int, nargs="+", default=[1, 16, 64, 250])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    agent = MPDiffuserAgent.load(options.agent, num_steps=options.steps)
    space = gym.make(options.agent).observation_space
    space.seed(0)
    print("envs  ms per call  ms per plan  plans/s  reverse steps %")
    for count in options.envs:
        samples = [space.sample() for _ in range(count)]
        if isinstance(samples[0], dict):
            observations = {key: np.stack([one[key] for one in samples]) for key in samples[0]}
        else:
            observations = np.clip(np.stack(samples), -1, 1)
        whole, sampling = seconds(agent, observations, options.repeats)
        print(
            f"{count:4d} {1e3 * whole:12.1f} {1e3 * whole / count:12.3f} {count / whole:8.0f} "
            f"{100 * sampling / whole:16.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
