"""Load an agent, act, and save a picture of its plan.

python examples/predict.py                                # the agent that ships for the car
python examples/predict.py outputs/agents/lqr.safetensors --env LQR-v0
"""

import argparse

import gymnasium as gym
import imageio.v3 as iio

from mpd_gym import MPDiffuserAgent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("agent", nargs="?", default="CarUMaze-v0")
    parser.add_argument("--env", default="CarUMaze-v0")
    parser.add_argument("--picture", default="plan.png")
    options = parser.parse_args()

    agent = MPDiffuserAgent.load(options.agent)
    env = gym.make(options.env, render_mode="rgb_array")
    observation, _ = env.reset(seed=0)
    action, _ = agent.predict(observation)  # the second is the state: give it to the next call
    plan = agent.plan(observation, num_candidates=8)

    env.unwrapped.draw_plan(plan.observations, plan.chosen)
    iio.imwrite(options.picture, env.render())
    print(f"action {action}, planned in {1e3 * plan.seconds['total']:.0f} ms: {options.picture}")


if __name__ == "__main__":
    main()
