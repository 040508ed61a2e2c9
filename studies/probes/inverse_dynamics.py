"""How precisely actions can be read off two successive states, and how far noise on them spoils it.

Agents with learned inverse dynamics, Decision Diffuser above all, read actions off planned states
with a MLP on (x_t, x_{t+1}), which is trained here alone, as the laptop preset does, on the
planner's data. Beside it stand one that sees (x_t, x_{t+1} - x_t), the difference in units of its
standard deviation, and, where the dynamics model has other data, one that learned from those: the
car's random drives steer at full lock, where the recorded action has no effect. All are tested on
the planner's data. Everything is normalised; the noise stands for errors of planned states.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mpd_gym.agents.losses import MLP_TARGETS
from mpd_gym.agents.presets import DATASETS, preset
from mpd_gym.datasets import WindowConfig, WindowSampler, fit_normalizers, load_episodes
from mpd_gym.datasets.traversal import split_episodes
from mpd_gym.models.mlp import mlp_layers

ENVS = ("CarUMaze-v0", "LatentPendulum-v0")
NOISE = (0.0, 0.002, 0.01)
HIDDEN = (256, 256)
View = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    """Print the error of the actions for each environment, kind of input and noise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environments", nargs="*", default=ENVS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title=f"RMS error of actions, {platform.machine()}, torch {torch.__version__}")
    for head in ("environment", "input", "std of actions", *(f"noise {one:g}" for one in NOISE)):
        table.add_column(head)
    for env_id in given.environments:
        for row in _rows(env_id):
            table.add_row(*row)
    Console(width=120).print(table)


def _pairs(sampler: WindowSampler, size: int, rng: np.random.Generator) -> tuple[Tensor, ...]:
    """Successive states, and the actions between them."""
    inputs, actions = MLP_TARGETS["inverse_dynamics"](sampler.sample(size, rng))
    return *torch.as_tensor(inputs).chunk(2, dim=-1), torch.as_tensor(actions)


def _pair(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat((x, y), dim=-1)


def _rows(env_id: str) -> list[list[str]]:
    config: Any = preset("laptop", env_id, "decision_diffuser")
    usual, others = ([load_episodes(name) for name in side or ()] for side in DATASETS[env_id])
    normalizers = fit_normalizers(others or usual, config.normalizer)
    windows = WindowConfig(config.horizon, padding="none")
    sides = [
        list(zip(*(split_episodes(source, 0.05, 0) for source in side), strict=True))
        for side in (usual, others or usual)
    ]
    (train, kept), (wider, _) = (
        [WindowSampler(part, windows, normalizers) for part in side] for side in sides
    )

    before, after, _ = _pairs(train, 1000, np.random.default_rng(1))
    scale = (after - before).flatten(0, 1).std(dim=0).clamp(min=1e-6)
    kinds: dict[str, tuple[View, WindowSampler]] = {
        "pair": (_pair, train),
        "difference": (lambda x, y: torch.cat((x, (y - x) / scale), dim=-1), train),
    }
    if others:
        kinds["pair, dynamics model's data"] = (_pair, wider)
    held_out = _pairs(kept, 1000, np.random.default_rng(2))
    x, _, u = held_out
    rows = []
    for kind, (view, sampler) in kinds.items():
        settings, rng = config.regressor_training, np.random.default_rng(0)
        batches = (_pairs(sampler, settings.batch_size, rng) for _ in range(settings.steps))
        torch.manual_seed(0)
        network = mlp_layers((2 * x.shape[-1], *HIDDEN, u.shape[-1]))
        _train(network, view, batches, settings.learning_rate)
        rows.append([env_id, kind, f"{u.std():.3f}", *_errors(network, view, held_out)])
    return rows


def _errors(network: torch.nn.Module, view: View, held_out: tuple[Tensor, ...]) -> list[str]:
    """Root mean square error of the actions for each noise."""
    x, y, u = held_out
    errors = []
    for size in NOISE:
        noise = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            read = network(view(x + size * noise[0], y + size * noise[1]))
        errors.append(f"{(read - u).square().mean().sqrt():.4f}")
    return errors


def _train(
    network: torch.nn.Module, view: View, batches: Iterable[tuple[Tensor, ...]], rate: float
) -> None:
    """Minimise the squared error of the actions."""
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    for x, y, u in batches:
        loss = (network(view(x, y)) - u).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
