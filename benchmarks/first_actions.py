"""How well agents read the present state: their first actions against the recorded ones.

Of recorded windows, from the second half of a data set's episodes, each agent draws 8 plans without
guidance; printed are the correlation of the mean of their first actions with what was done, the
root mean square of the difference, and the spread of the first actions within one window.

Usage: ``python benchmarks/first_actions.py DATASET FILE... [--first 30] [--last 150]``; `first` and
`last` are steps of the episode.
"""

from __future__ import annotations

import argparse
import platform

import numpy as np
import torch

from mpd_gym import load_agent
from mpd_gym.datasets import load_episodes

WINDOWS, CANDIDATES = 512, 8


def main() -> None:
    """Draw windows, plan, and print one line for each agent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--first", type=int, default=30)
    parser.add_argument("--last", type=int, default=150)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, rng = load_episodes(options.dataset), np.random.default_rng(0)
    episodes = [data.episode(int(i)) for i in rng.integers(len(data) // 2, len(data), WINDOWS)]
    steps = rng.integers(options.first, options.last, WINDOWS)
    drawn = list(zip(episodes, steps, strict=True))
    done = np.array([episode.actions[step] for episode, step in drawn])
    print(f"{WINDOWS} windows, {platform.machine()}, {torch.__version__}")
    for file in options.files:
        agent = load_agent(file, "cpu").with_options(
            guidance_scale=0.0, num_candidates=CANDIDATES, temperature=1.0
        )
        plans = [agent.plan(episode.observations[step]) for episode, step in drawn]
        first = np.array([plan.actions[:, 0] for plan in plans])
        mean, spread = first.mean(axis=1), first.std(axis=1).mean()
        correlation = np.corrcoef(mean.ravel(), done.ravel())[0, 1]
        error = np.sqrt(np.mean((mean - done) ** 2))
        print(f"{file}: correlation {correlation:.2f}, error {error:.3f}, spread {spread:.3f}")


if __name__ == "__main__":
    main()
