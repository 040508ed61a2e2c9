"""What the plans of the shipped car are worth.

On starts that settings were chosen on: how much samples of one plan differ, and what their mean
gains; where the dynamics model believes that given actions lead, with the goal told and without;
and what becomes of plans that are made anew in the middle of an episode.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from mpd_gym import MPDiffuserAgent
from mpd_gym.diffusion import guided, make_schedule
from mpd_gym.diffusion.samplers import ddpm_posterior
from mpd_gym.evaluation.returns import evaluate, execute_plans
from mpd_gym.types import Array

ENV_ID = "CarUMaze-v0"
FIRST_START = 100_000
SAMPLES, STEPS = 8, 10
COLD = 0.01  # temperature of the dynamics model's predictions


def starts(count: int) -> tuple[range, list[Any]]:
    """Seeds, and the observations that they give."""
    env, seeds = gym.make(ENV_ID), range(FIRST_START, FIRST_START + count)
    return seeds, [env.reset(seed=seed)[0] for seed in seeds]


def executed(actions: Array, seeds: range) -> tuple[Array, Array]:
    """Positions at the end ``[E, 2]``, and which cars touched a wall ``[E]``."""
    rollouts = execute_plans(list(actions), ENV_ID, seeds=seeds)
    walls = [any(bool(info["collision"]) for info in one.infos) for one in rollouts]
    return np.stack([one.observations[-1, :2] for one in rollouts]), np.array(walls)


def means_of_samples(agent: MPDiffuserAgent, count: int = 125) -> None:
    """Print the spread of samples, and the free success of the first one and of their mean."""
    seeds, observations = starts(count)
    goals = np.stack([one["desired_goal"] for one in observations])
    print(f"{count} starts, {SAMPLES} samples in {STEPS} steps, open loop")
    for composition in ("planner_only", "alternating_matched"):
        for temperature in (0.01, 0.5, 1.0):
            sampler = agent.with_options(
                num_candidates=SAMPLES,
                samples_per_candidate=1,
                num_steps=STEPS,
                temperature=temperature,
                composition=composition,
            )
            actions = np.stack([sampler.plan(one).actions for one in observations])
            shares = []
            for plans in (actions[:, 0], actions.mean(axis=1)):
                ends, walls = executed(plans, seeds)
                near = np.linalg.norm(ends - goals, axis=-1) < 1
                shares.append(100 * float(np.mean(near & ~walls)))
            print(
                f"  {composition:20s} temperature {temperature:4g}: spread of the actions "
                f"{actions.std(axis=1).mean():.4f}, success without collision of one "
                f"{shares[0]:.1f} %, of the mean {shares[1]:.1f} %"
            )


@torch.no_grad()
def believed(agent: MPDiffuserAgent, observations: list[Any], actions: Array, told: bool) -> Array:
    """States ``[E, H, nx]`` that the dynamics model expects of actions in environment units."""
    torch.manual_seed(0)
    schedule = make_schedule(agent.config.schedule, agent.config.diffusion_steps)
    initial = np.stack([one["observation"] for one in observations])
    goals = np.stack([one["desired_goal"] for one in observations])
    normalizers = agent.normalizers

    def tensor(values: Array) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32)

    levels = schedule.levels(STEPS)
    network: Any = agent.models["dynamics"]
    denoiser = guided(
        network,
        schedule,
        tensor(normalizers.observation.normalize(initial)),
        tensor(agent.conditions.encode("goal", goals)),
        torch.full((len(goals), 1), float(told)),
        1.0,
        levels=levels,
        prediction=agent.config.loss.prediction,
    )
    controls = tensor(normalizers.action.normalize(actions))
    scale = COLD**0.5
    states = scale * torch.randn(*actions.shape[:2], initial.shape[-1])
    for k, k_next in zip(levels, (*levels[1:], 0), strict=True):
        noise = scale * torch.randn_like(controls)
        noisy = schedule.signal(k) * controls + schedule.noise(k) * noise
        clean = denoiser(torch.cat((states, noisy), dim=-1), k)
        mean, std = ddpm_posterior(states, clean, k, k_next, schedule)
        states = mean + scale * std * torch.randn_like(states)
    return normalizers.observation.unnormalize(states.numpy())


def beliefs(agent: MPDiffuserAgent, count: int = 64) -> None:
    """Print where plans of the planner end, and where its models say that they do."""
    seeds, observations = starts(count)
    goals = np.stack([one["desired_goal"] for one in observations])
    sampler = agent.with_options(
        samples_per_candidate=1, num_steps=STEPS, temperature=1.0, composition="planner_only"
    )
    plans = [sampler.plan(one) for one in observations]
    actions = np.stack([plan.actions[plan.chosen] for plan in plans])
    ends, _ = executed(actions, seeds)
    expected = {
        "planner": np.stack([plan.observations[plan.chosen] for plan in plans]),
        "dynamics model, given the goal": believed(agent, observations, actions, told=True),
        "dynamics model, not told": believed(agent, observations, actions, told=False),
    }

    def median(left: Array, right: Array) -> float:
        return float(np.median(np.linalg.norm(left - right, axis=-1)))

    print(f"{count} plans of the planner, medians at their end: {median(ends, goals):.2f} m off")
    for name, states in expected.items():
        last = states[:, -1, :2]
        print(f"  {name}: goal {median(last, goals):.2f} m, truth {median(last, ends):.2f} m away")


def closed_loop(agent: MPDiffuserAgent, count: int = 64) -> None:
    """Print how many cars arrive with plans from noise and with plans from the last one."""
    seeds = range(FIRST_START, FIRST_START + count)
    print(f"{count} episodes, means of {SAMPLES} samples at temperature 0.5")
    for chunk in (4, 1):
        for warm in (0, 1):
            played = evaluate(
                agent.with_options(
                    num_candidates=1,
                    samples_per_candidate=SAMPLES,
                    num_steps=STEPS,
                    temperature=0.5,
                    action_chunk=chunk,
                    warm_start_steps=warm,
                ),
                ENV_ID,
                seeds=seeds,
                num_envs=count,
            )
            assert played.successes is not None and played.collisions is not None
            arrived = played.successes & ~played.collisions
            kind = "one step from the last" if warm else f"{STEPS} steps from noise"
            print(f"  {chunk} actions a plan, {kind}: {arrived.sum()} arrive without collision")


def main() -> None:
    """Print all three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("agent", nargs="?", default=ENV_ID)
    torch.set_num_threads(1)
    agent = MPDiffuserAgent.load(parser.parse_args().agent, device="cpu", actions="planned")
    means_of_samples(agent)
    beliefs(agent)
    closed_loop(agent)
