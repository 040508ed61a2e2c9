"""What is wrong with plans of the car that are executed without looking: states or actions?

``python -m studies car-read-off [AGENT ...]``, the shipped agent by default. On 250 starts from
100000 on, or from ``--first`` on, one sample in 10 steps: (1) the planner alone and MPDiffuser;
(2) MPDiffuser with the simulator as its dynamics model, told the actions that the
planner has in mind, at all levels or in the last tenth; (3) planned states, with actions read off
them: what takes the car from one planned speed and steering angle to the next, instead of the
planned actions.
Then whole episodes of 64 steps, with two plans in each and with a new plan for each action, in one
step from the last: with planned actions, with those read off, and with those that the agent's own
inverse dynamics read off, where it has learned them.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from mpd_gym import MPDiffuserAgent
from mpd_gym.agents.planning import Request
from mpd_gym.envs.car_model import inverse_transition, transition
from mpd_gym.evaluation.returns import (
    evaluate,
    execute_plans,
    mean_interval,
    proportion_interval,
    stacked,
)
from mpd_gym.types import Array, Denoiser
from studies.measures import state_error
from studies.peers import ALONE, LITERAL, OURS

ENV_ID = "CarUMaze-v0"
EPISODES = 250
OPTIONS: dict[str, Any] = {
    "num_candidates": 1,
    "samples_per_candidate": 1,
    "num_steps": 10,
    "warm_start_steps": 0,
    "guidance_scale": 1.0,
    "temperature": 0.5,
    "actions": "planned",
}
MATCHED, ALTERNATING, LATE = "alternating_matched", "alternating", (0.0, 0.1)
COMPOSITIONS = ("planner_only", MATCHED, ALTERNATING)
FORMS: dict[str, dict[str, Any]] = {
    "two plans": {"action_chunk": 32},
    "a plan for each action": {"action_chunk": 1, "warm_start_steps": 1},
}


def simulated(states: Array, actions: Array) -> Array:
    """States x_1 … x_H ``[E, H, 5]`` that actions ``[E, H, 2]`` lead to from ``[E, 5]``."""
    rows = []
    for step in range(actions.shape[1]):
        states = transition(states, actions[:, step])
        rows.append(states)
    return np.stack(rows, axis=1)


def with_exact_dynamics(agent: MPDiffuserAgent) -> MPDiffuserAgent:
    """Let the simulator replace an agent's dynamics model."""
    learned = agent._denoiser
    states, controls = agent.normalizers.observation, agent.normalizers.action

    def denoiser(role: str, request: Request, levels: Sequence[int], *others: Any) -> Denoiser:
        if role != "dynamics":
            return learned(role, request, levels, *others)
        planner = learned("planner", request, levels)

        def predict(trajectory: Tensor, k: int) -> Tensor:
            planned = planner(trajectory, k)[..., agent.layout.states :]
            initial = states.unnormalize(request.initial.numpy())
            led = simulated(initial, controls.unnormalize(planned.numpy()))
            return torch.as_tensor(states.normalize(led), dtype=torch.float32)

        return predict

    agent._denoiser = denoiser  # type: ignore[method-assign, assignment]
    return agent


def tell(name: str, planned: Array, actions: Array, goals: Array, seeds: range) -> None:
    """Execute actions and print what became of them."""
    rollouts = execute_plans(list(actions.astype(np.float32)), ENV_ID, seeds=seeds)
    ends = np.stack([one.observations[-1, :2] for one in rollouts])
    walls = np.array([any(info["collision"] for info in one.infos) for one in rollouts])
    near = np.linalg.norm(ends - goals, axis=-1) < 1
    errors = [
        np.nanmean(state_error(plan, one.observations[1:], (0, 1)))
        for plan, one in zip(planned, rollouts, strict=True)
    ]
    success, free = (100 * proportion_interval(flags).mean for flags in (near, near & ~walls))
    interval = proportion_interval(near)
    promised = np.linalg.norm(planned[:, -1, :2] - goals, axis=-1).mean()
    kept = mean_interval(np.linalg.norm(ends - goals, axis=-1))
    print(
        f"  {name:43s} {success:5.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}] "
        f"{free:5.1f}  {np.mean(errors):.3f} m  {promised:.2f} m  {kept.mean:.3f} "
        f"[{kept.low:.3f}, {kept.high:.3f}] m"
    )


def closed_loop(path: str, seeds: range) -> None:
    """Play episodes, and print how many arrive without a collision."""
    agent = MPDiffuserAgent.load(path, device="cpu").with_options(**OPTIONS)
    reads = ["planned", "read off", *(["learned"] if agent.config.inverse_dynamics else [])]
    for form, composition, read in itertools.product(FORMS, COMPOSITIONS, reads):
        actions = "inverse_dynamics" if read == "learned" else "planned"
        played = agent.with_options(**FORMS[form], composition=composition, actions=actions)
        if read == "read off":
            played.set_inverse_dynamics(lambda x, _, y: inverse_transition(x, y))
        found = evaluate(played, ENV_ID, seeds=seeds, num_envs=len(seeds))
        assert found.successes is not None and found.collisions is not None
        share = proportion_interval(found.successes & ~found.collisions)
        name = f"{form}, {composition}, {read}"
        low, high = 100 * share.low, 100 * share.high
        print(f"  closed loop, {name:53s} {100 * share.mean:5.1f} [{low:.1f}, {high:.1f}]")


def main() -> None:
    """Print a table for each agent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("agents", nargs="*", default=[ENV_ID])
    parser.add_argument("--first", type=int, default=100_000, help="seed of the first start")
    arguments = parser.parse_args()
    seeds = range(arguments.first, arguments.first + EPISODES)
    torch.set_num_threads(1)
    env = gym.make(ENV_ID)
    starts = stacked([env.reset(seed=seed)[0] for seed in seeds])
    initial, goals = starts["observation"], starts["desired_goal"]
    rows: tuple[tuple[str, bool, dict[str, Any]], ...] = (
        (ALONE, False, {"composition": "planner_only"}),
        (OURS, False, {"composition": MATCHED}),
        (LITERAL, False, {"composition": ALTERNATING}),
        ("exact dynamics", True, {"composition": MATCHED}),
        ("exact dynamics, last levels", True, {"composition": MATCHED, "dynamics_levels": LATE}),
    )
    for path in arguments.agents:
        print(
            f"{Path(path).name}, {len(seeds)} starts, one sample: success % [95 %], without a "
            "collision %, planned to executed position, planned end to goal, executed end to goal"
        )
        for name, exact, options in rows:
            agent = MPDiffuserAgent.load(path, device="cpu")
            agent = agent.with_options(**OPTIONS, **options)
            agent = with_exact_dynamics(agent) if exact else agent
            _, state = agent.predict(starts)
            planned, actions = agent.planned(state)
            tell(name, planned, actions, goals, seeds)
            if exact:
                continue
            before = np.concatenate([initial[:, None], planned[:, :-1]], axis=1)
            tell(f"{name}, read off", planned, inverse_transition(before, planned), goals, seeds)
            if agent.config.inverse_dynamics:
                _, state = agent.with_options(actions="inverse_dynamics").predict(starts)
                planned, actions = agent.planned(state)
                tell(f"{name}, learned", planned, actions, goals, seeds)
        closed_loop(path, seeds)
