"""Change what a trained agent is after, without training: rewards, costs, budget, ranker.

    python examples/change_the_task.py outputs/agents/pendulum.safetensors

The agent is one for ConstrainedPendulum-v0, for example from
``mpd-gym train mpd_gym/constrained-pendulum/mixed-v0``.
"""

import argparse

import gymnasium as gym
import numpy as np

from mpd_gym import MPDiffuserAgent


def slow_speed(observations, actions, next_observations):
    """A reward of my own: turn as slowly as possible. Arrays ``[N, H, …]``, result ``[N, H]``."""
    return -np.abs(next_observations[..., 2])


def over_limit(observations, actions, next_observations):
    """A cost of my own: 1 wherever the speed is over 6 rad/s."""
    return (np.abs(next_observations[..., 2]) > 6.0).astype(float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("agent")
    parser.add_argument("--candidates", type=int, default=16)
    options = parser.parse_args()

    agent = MPDiffuserAgent.load(options.agent, num_candidates=options.candidates)
    observation, _ = gym.make("ConstrainedPendulum-v0").reset(seed=0)

    def show(title: str) -> None:
        plan = agent.plan(observation, deterministic=True)
        speed = np.abs(plan.observations[plan.chosen, :, 2])
        print(
            f"{title:32s} candidate {plan.chosen:2d}, {plan.feasible.sum():2d} within the budget, "
            f"fastest {speed.max():.2f} rad/s, {1e3 * plan.seconds['total']:.0f} ms"
        )

    show("as trained")
    agent.set_reward(slow_speed)
    agent.set_budget(None)
    show("slowest candidate")
    agent.set_reward(None)
    agent.set_cost(over_limit)
    agent.set_budget(0.0)
    show("best candidate below 6 rad/s")
    agent.set_ranker("first")
    show("no ranking")


if __name__ == "__main__":
    main()
