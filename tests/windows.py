"""Episodes whose entries tell where they are from, and windows of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpd_gym.datasets import (
    ConditionSpec,
    EpisodeSource,
    Normalizers,
    WindowConfig,
    WindowSampler,
    fit_conditions,
    fit_normalizers,
    load_episodes,
)
from mpd_gym.types import Array, Batch, Episode

LENGTHS = (7, 1, 12, 3)
HORIZON = 5


def marked(number: int, steps: int, *, offset: float = 0.0, goals: bool = True) -> Episode:
    """Episode in which every entry tells its episode and step: 1000 · number + step + offset."""
    mark = 1000.0 * number + np.arange(steps + 1) + offset
    now, ends = mark[:-1], np.arange(steps) == steps - 1
    observation = np.stack([mark, -mark], axis=1)
    goal = np.stack([mark + 0.25, mark + 0.5], axis=1)
    return Episode(
        observations={"observation": observation, "desired_goal": goal} if goals else observation,
        actions=now[:, None],
        rewards=now + 0.125,
        terminations=ends & (number % 2 == 0),
        truncations=ends & (number % 2 == 1),
        costs=now + 0.5,
    )


def marked_source(lengths: tuple[int, ...] = LENGTHS, **options: Any) -> EpisodeSource:
    return load_episodes([marked(i + 1, steps, **options) for i, steps in enumerate(lengths)])


def sampler(
    sources: EpisodeSource | list[EpisodeSource] | None = None,
    kind: str = "minmax",
    *,
    padding: str = "repeat",
    specs: tuple[ConditionSpec, ...] = (),
    horizon: int = HORIZON,
    **options: Any,
) -> tuple[WindowSampler, Normalizers]:
    sources = sources or marked_source()
    config = WindowConfig(horizon=horizon, discount=0.9, padding=padding, conditions=specs)
    normalizers = fit_normalizers(sources, kind)
    functions = {s.name: lambda e: e.rewards[:, None] for s in specs if s.kind == "custom"}
    conditions = fit_conditions(sources, config, normalizers, functions) if specs else None
    return WindowSampler(sources, config, normalizers, conditions, **options), normalizers


def decoded(batch: Batch, normalizers: Normalizers) -> dict[str, Array]:
    """Arrays of a batch in environment units; marks have 1/8 as their finest part."""
    entries = {
        "initial": normalizers.observation.unnormalize(batch.initial),
        "observations": normalizers.observation.unnormalize(batch.observations),
        "actions": normalizers.action.unnormalize(batch.actions),
        "rewards": batch.rewards,
        "costs": batch.costs,
    }
    return {name: np.round(array * 8) / 8 for name, array in entries.items()}


ALL = (
    ConditionSpec("return"),
    ConditionSpec("cost"),
    ConditionSpec("goal"),
    ConditionSpec("final_state"),
    ConditionSpec("custom", name="now", size=1),
)


def second_source() -> EpisodeSource:
    return load_episodes([marked(50, 40, goals=False), marked(51, 11, goals=False)])
