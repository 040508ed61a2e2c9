"""A small training that several test files share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpd_gym import types
from mpd_gym.training import TrainingConfig, TrainingResult

CONFIG = TrainingConfig(
    steps=40,
    batch_size=8,
    learning_rate=1e-2,
    ema_every=5,
    validation_every=20,
    validation_batches=2,
    checkpoint_every=10,
    log_every=7,
    threads=1,
)
QUICK: dict[str, Any] = {"name": "toy", "progress": False}


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 1))


def sampler(batch_size: int, rng: np.random.Generator) -> dict[str, types.Array]:
    x = rng.normal(size=(batch_size, 3)).astype(np.float32)
    return {"x": x, "y": np.sin(x).sum(1, keepdims=True)}


def noisy_loss(
    module: nn.Module, batch: Mapping[str, Tensor], noise: torch.Generator
) -> dict[str, Tensor]:
    """Squared error with a drop-out of inputs, drawn from `noise`."""
    kept = torch.rand(batch["x"].shape, generator=noise) > 0.2
    error = (module(batch["x"] * kept) - batch["y"]).square()
    return {"loss": error.mean(), "largest": error.max()}


def assert_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def assert_same_result(first: TrainingResult, second: TrainingResult) -> None:
    assert_same(first.weights, second.weights)
    for one, other in (
        (first.training, second.training),
        (first.validation, second.validation),
    ):
        assert one.names == other.names
        assert np.array_equal(one.steps, other.steps)
        assert np.array_equal(one.values, other.values)


def differs(config: TrainingConfig, **changes: Any) -> TrainingConfig:
    return dataclasses.replace(config, **changes)
