"""Film an episode with the plan that is being executed drawn in, beside the planner alone.

python examples/watch_the_plan.py CarUMaze-v0 --film car.gif
python examples/watch_the_plan.py LQR-v0 --agent outputs/agents/lqr.safetensors
"""

import argparse

from mpd_gym import MPDiffuserAgent
from mpd_gym.evaluation.figures import captioned, draws_plan, rollout_frames, save_gif, side_by_side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("env")
    parser.add_argument("--agent", help="file; the agent that ships for the environment if missing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--film", default="outputs/plan.gif")
    options = parser.parse_args()

    agent = MPDiffuserAgent.load(options.agent or options.env)
    alone = agent.with_options(composition="planner_only")  # the same weights
    columns = []
    for name, policy in {"planner and dynamics model": agent, "planner alone": alone}.items():
        frames = rollout_frames(
            policy,
            options.env,
            seed=options.seed,
            draw=draws_plan(policy),
            max_frames=options.steps,
        )
        columns.append(captioned(list(frames), name))
    save_gif(side_by_side(columns), options.film)
    print(f"{max(map(len, columns))} pictures: {options.film}")


if __name__ == "__main__":
    main()
