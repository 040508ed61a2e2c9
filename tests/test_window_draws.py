"""Windows are drawn uniformly or by weight, and episodes split into training and validation."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from windows import ALL, HORIZON, LENGTHS, decoded, marked, marked_source, sampler, second_source

from mpd_gym.datasets import (
    ConditionSpec,
    WindowConfig,
    WindowSampler,
    fit_normalizers,
    load_episodes,
    split_episodes,
)
from mpd_gym.errors import ConfigError, DataError, InputError
from mpd_gym.types import Episode


def test_equal_generators_draw_equal_batches() -> None:
    windows, _ = sampler(specs=ALL)
    draws = [windows.sample(32, np.random.default_rng(seed)).initial for seed in (5, 5, 6)]
    assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


def test_windows_are_drawn_uniformly() -> None:
    windows, normalizers = sampler()
    found = decoded(windows.sample(23_000, np.random.default_rng(1)), normalizers)
    _, counts = np.unique(found["initial"][:, 0], return_counts=True)
    assert len(counts) == len(windows)
    assert np.abs(counts / 1000 - 1).max() < 0.15  # 4.7 standard deviations


@pytest.mark.parametrize("memory_limit", [2**30, 0])
def test_several_sources_are_drawn_by_weight(memory_limit: int) -> None:
    sources = [marked_source(goals=False), second_source()]
    windows, normalizers = sampler(sources, weights=[1, 3], memory_limit=memory_limit)
    assert len(windows) == sum(LENGTHS) + 51
    found = decoded(windows.sample(2000, np.random.default_rng(2)), normalizers)
    marks = found["initial"][:, 0]
    assert abs((marks >= 50_000).mean() - 0.75) < 0.04
    assert len(np.unique(marks)) > 65
    whole = decoded(windows.windows(np.arange(len(windows))), normalizers)
    assert whole["initial"][sum(LENGTHS), 0] == 50_000
    assert whole["initial"][-1, 0] == 51_010


def test_sources_without_weights_are_drawn_by_their_steps() -> None:
    sources = [marked_source(goals=False), second_source()]
    windows, normalizers = sampler(sources)
    found = decoded(windows.sample(4000, np.random.default_rng(2)), normalizers)
    assert abs((found["initial"][:, 0] >= 50_000).mean() - 51 / 74) < 0.04


def test_a_weight_of_zero_leaves_a_source_out() -> None:
    sources = [marked_source(goals=False), second_source()]
    for weights, expected in (([0, 1], {50, 51}), ([1, 0], {1, 2, 3, 4})):
        windows, normalizers = sampler(sources, weights=weights)
        found = decoded(windows.sample(500, np.random.default_rng(2)), normalizers)
        assert set((found["initial"][:, 0] // 1000).tolist()) == expected


def test_windows_without_padding_are_drawn_by_weight() -> None:
    sources = [marked_source(goals=False), second_source()]
    windows, normalizers = sampler(sources, padding="none", weights=[1, 3])
    found = decoded(windows.sample(2000, np.random.default_rng(2)), normalizers)
    marks = found["initial"][:, 0]
    assert abs((marks >= 50_000).mean() - 0.75) < 0.04
    assert len(np.unique(marks)) == len(windows)


def test_a_share_of_the_windows_begins_at_the_first_step() -> None:
    source = marked_source(goals=False)
    config = WindowConfig(horizon=HORIZON, first_step_share=0.5)
    normalizers = fit_normalizers(source, "minmax")
    windows = WindowSampler(source, config, normalizers)
    marks = decoded(windows.sample(23_000, np.random.default_rng(3)), normalizers)["initial"][:, 0]
    expected = {1000.0 * (i + 1) + t: 500 for i, steps in enumerate(LENGTHS) for t in range(steps)}
    for number, steps in enumerate(LENGTHS):
        expected[1000.0 * (number + 1)] += 500 * steps
    values, counts = np.unique(marks, return_counts=True)
    assert_array_equal(values, list(expected))
    assert np.abs(counts / list(expected.values()) - 1).max() < 0.2  # 4.5 standard deviations
    with pytest.raises(ConfigError, match="first_step_share: expected a finite number in"):
        WindowConfig(first_step_share=1.5)


def test_bad_draws_are_refused() -> None:
    windows, _ = sampler()
    with pytest.raises(InputError, match="batch_size: expected at least 1, got 0"):
        windows.sample(0, np.random.default_rng(0))
    wrong: list[Any] = [[], [[1]], [0.5], np.zeros(2, bool)]
    for indices in wrong:
        with pytest.raises(InputError, match="indices: expected a list of whole numbers"):
            windows.windows(indices)
    for beyond in ([-1], [0, 23]):
        with pytest.raises(InputError, match="indices: expected 0 to 22, got"):
            windows.windows(beyond)


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")]])
def test_bad_weights_are_refused(weights: list[float]) -> None:
    sources = [marked_source(goals=False), second_source()]
    with pytest.raises(ConfigError, match="weights: expected one non-negative number for each"):
        sampler(sources, weights=weights)


def test_a_batch_takes_well_under_a_millisecond() -> None:
    rng = np.random.default_rng(0)
    steps = 5000
    episode = Episode(
        observations=rng.normal(size=(steps + 1, 11)),
        actions=rng.normal(size=(steps, 3)),
        rewards=rng.normal(size=steps),
        terminations=np.zeros(steps, bool),
        truncations=np.arange(steps) == steps - 1,
    )
    specs = (ConditionSpec("return"),)
    windows, _ = sampler(load_episodes([episode]), "cdf", specs=specs, horizon=32)
    seconds = []
    for _ in range(100):
        start = time.perf_counter()
        windows.sample(64, rng)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 5e-4  # measured: 45 µs


def test_split_is_a_partition_by_episode() -> None:
    source = load_episodes([marked(i, 3) for i in range(20)])
    training, validation = split_episodes(source, 0.25, seed=7)
    assert (len(training), len(validation)) == (15, 5)
    marks = [
        [int(e.actions[0, 0]) // 1000 for e in (part.episode(i) for i in range(len(part)))]
        for part in (training, validation)
    ]
    assert sorted(marks[0] + marks[1]) == list(range(20))
    assert marks[0] == sorted(marks[0])
    again = split_episodes(source, 0.25, seed=7)[1]
    assert [int(e.actions[0, 0]) // 1000 for e in again] == marks[1]
    other = split_episodes(source, 0.25, seed=8)[1]
    assert [int(e.actions[0, 0]) // 1000 for e in other] != marks[1]


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_split_leaves_an_episode_on_each_side(fraction: float) -> None:
    parts = split_episodes(marked_source(), fraction, seed=0)
    assert min(map(len, parts)) == 1


def test_bad_splits_are_refused() -> None:
    with pytest.raises(ConfigError, match="fraction: expected a value between 0 and 1, got 1"):
        split_episodes(marked_source(), 1, seed=0)
    with pytest.raises(DataError, match="expected at least 2 episodes to split"):
        split_episodes(load_episodes([marked(1, 3)]), 0.5, seed=0)
