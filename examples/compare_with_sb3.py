"""Stable-Baselines3's own `evaluate_policy` on an agent and on a policy of SB3.

    python examples/compare_with_sb3.py --agent outputs/agents/pendulum.safetensors

Without a zip of yours, a small SAC is trained first. An agent takes the place of an SB3 model
unchanged, with one environment and with several. `mpd-gym compare` adds intervals, costs and films.
"""

import argparse

from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from mpd_gym import MPDiffuserAgent
from mpd_gym.collect.sb3_zip import load_sb3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", default="ConstrainedPendulum-v0")
    parser.add_argument("--agent", help="file; the agent that ships for the environment if missing")
    parser.add_argument("--zip", help="your SB3 policy for the environment")
    parser.add_argument("--steps", type=int, default=5_000, help="of SAC's training")
    parser.add_argument("--episodes", type=int, default=4)
    options = parser.parse_args()

    path = options.zip
    if path is None:
        path = "outputs/small-sac.zip"
        SAC("MlpPolicy", options.env, learning_starts=100, seed=0).learn(options.steps).save(path)
    policies = {
        "MPDiffuser": MPDiffuserAgent.load(options.agent or options.env),
        "SB3": load_sb3(path, options.env),  # runs nothing that is pickled
    }
    for copies in (1, options.episodes):
        for name, policy in policies.items():
            envs = make_vec_env(options.env, n_envs=copies, seed=1_000)
            mean, deviation = evaluate_policy(policy, envs, n_eval_episodes=options.episodes)
            envs.close()
            print(f"{name}, {copies} at a time: return {mean:.1f} ± {deviation:.1f}")


if __name__ == "__main__":
    main()
