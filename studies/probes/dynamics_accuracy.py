"""How well D-MPC's dynamics model knows where recorded actions lead, in the maze.

For agents that the studies ``dmpc`` or ``car-data`` trained. The actions are
of expert drives that the agent did not learn from, and of random drives that it did.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from mpd_gym.agents import DMPCAgent, load_agent
from mpd_gym.agents.planning import Request, SharedNoise
from mpd_gym.datasets import EpisodeSource, load_episodes
from mpd_gym.diffusion import sample, start_noise
from mpd_gym.types import Array

DRIVES = {
    "expert": ("mpd_gym/car-umaze/expert-v0", range(1500, 1628)),
    "random": ("mpd_gym/car-umaze/random-v0", range(128)),
}
STEPS = (10, 50)
TEMPERATURE = 0.1


def errors(agent: DMPCAgent, drives: EpisodeSource, indices: range, steps: int) -> Array:
    """Distance of predicted to recorded positions in m, ``[E, H]``."""
    episodes = [drives.episode(index) for index in indices]
    states = np.stack([one.observations["observation"][: agent.horizon + 1] for one in episodes])
    actions = np.stack([one.actions[: agent.horizon] for one in episodes])
    sampler = agent.with_options(num_candidates=1, temperature=TEMPERATURE, num_steps=steps)
    nx, nu, sizes = states.shape[-1], actions.shape[-1], agent.conditions.sizes
    generator = torch.Generator().manual_seed(0)
    shape = (1, agent.horizon, nx + nu)
    known = agent.normalizers.observation.normalize(states[:, 0])
    request = Request(
        initial=torch.as_tensor(known, dtype=torch.float32),
        conditions=torch.zeros(len(states), sum(sizes.values())),
        present=torch.zeros(len(states), len(sizes)),
        noise=SharedNoise(generator, shape, len(states), shared=False),
        warm=None,
    )
    given = torch.as_tensor(agent.normalizers.action.normalize(actions), dtype=torch.float32)
    levels = sampler._schedule.levels(steps)
    dynamics = sampler._denoiser("dynamics", request, levels)
    with torch.no_grad():
        rows = sample(
            sampler._step(lambda rows, k: dynamics(torch.cat((rows, given), dim=-1), k)),
            start_noise(request.noise, TEMPERATURE)[..., :nx],
            levels,
            lambda: request.noise()[..., :nx],
        )
    predicted = agent.normalizers.observation.unnormalize(rows.numpy())
    distances: Array = np.linalg.norm(predicted[..., :2] - states[:, 1:, :2], axis=-1)
    return distances


def main() -> None:
    """Print mean and final error for each agent, kind of drive and number of steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("agents", nargs="+", help="files that the study dmpc or car-data trained")
    torch.set_num_threads(1)
    for path in parser.parse_args().agents:
        agent = load_agent(path, "cpu")
        assert isinstance(agent, DMPCAgent), f"{path}: expected a D-MPC agent"
        predicts = agent.config.loss_of("dynamics").prediction
        for kind, (name, indices) in DRIVES.items():
            drives = load_episodes(name, download=False)
            for steps in STEPS:
                found = errors(agent, drives, indices, steps)
                print(
                    f"{Path(path).name} predicts {predicts:5s} {kind} drives, {steps} steps: mean "
                    f"{found.mean():.2f} m, at the end {found[:, -1].mean():.2f} m"
                )
