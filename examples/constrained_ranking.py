"""Ranking by predicted return and cost (Algorithm 2 of the paper): the more candidates, the better?

    python examples/constrained_ranking.py outputs/agents/pendulum.safetensors

The agent is for ConstrainedPendulum-v0. With the budget 0 the candidate of highest predicted return
is chosen among those that are predicted to keep the limit; without, among all. The last rows know
the true cost instead of predicting it.
"""

import argparse

import numpy as np

from mpd_gym import MPDiffuserAgent, evaluate

ENV = "ConstrainedPendulum-v0"


def over_limit(observations, actions, next_observations):
    """The environment's cost as a function: arrays ``[N, H, …]``, result ``[N, H]``."""
    return (np.abs(next_observations[..., 2]) > 6.5).astype(float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("agent", nargs="?", default=ENV)
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--episodes", type=int, default=20)
    options = parser.parse_args()

    agent = MPDiffuserAgent.load(options.agent)
    rows = (("no budget", None, None), ("budget 0", 0.0, None), ("true cost", 0.0, over_limit))
    for name, budget, cost in rows:
        for count in options.candidates:
            policy = agent.with_options(num_candidates=count)
            policy.set_budget(budget)
            policy.set_cost(cost)
            seeds = range(1_000, 1_000 + options.episodes)
            summary = evaluate(policy, ENV, seeds=seeds, num_envs=options.episodes).summary()
            success, broken = summary["success"].mean, summary["violation"].mean
            print(f"{name:10s} {count:3d} candidates: {success:4.0%} held up within the limit, "
                  f"{broken:4.0%} broke it, return {summary['return']}")  # fmt: skip


if __name__ == "__main__":
    main()
