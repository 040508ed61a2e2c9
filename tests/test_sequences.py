"""Windows: alignment, episode ends, padding, memory against disk."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from windows import ALL, HORIZON, LENGTHS, decoded, marked, marked_source, sampler, second_source

from mpd_gym.datasets import (
    ConditionSpec,
    EpisodeSource,
    Normalizers,
    WindowConfig,
    WindowSampler,
    fit_conditions,
    fit_normalizer,
    fit_normalizers,
    load_episodes,
)
from mpd_gym.errors import ConfigError, DataError, InputError
from mpd_gym.types import Batch, Episode


@pytest.mark.parametrize("kind", ["cdf", "minmax", "gaussian"])
@pytest.mark.parametrize("memory_limit", [2**30, 0])
def test_no_window_crosses_an_episode_and_all_is_aligned(kind: str, memory_limit: int) -> None:
    windows, normalizers = sampler(kind=kind, specs=ALL, memory_limit=memory_limit)
    assert len(windows) == sum(LENGTHS)
    batch = windows.windows(np.arange(len(windows)))
    found = decoded(batch, normalizers)
    row = 0
    for number, steps in enumerate(LENGTHS, start=1):
        for t in range(steps):
            real = min(HORIZON, steps - t)
            now = 1000 * number + t + np.arange(HORIZON)
            later = np.minimum(now + 1, 1000 * number + steps)  # the last observation repeats
            assert_array_equal(found["initial"][row], [now[0], -now[0]])
            assert_array_equal(found["observations"][row], np.stack([later, -later], axis=1))
            assert_array_equal(found["actions"][row, :real, 0], now[:real])
            assert_array_equal(found["rewards"][row, :real], now[:real] + 0.125)
            assert_array_equal(found["costs"][row, :real], now[:real] + 0.5)
            assert_array_equal(batch.mask[row], np.arange(HORIZON) < real)
            ended = (np.arange(HORIZON) == steps - t - 1) & (number % 2 == 0)
            assert_array_equal(batch.terminations[row], ended)
            for name in ("rewards", "costs", "terminations"):
                assert_array_equal(getattr(batch, name)[row, real:], 0)
            assert_allclose(batch.conditions["now"][row], now[0] + 0.125)
            row += 1


def test_conditions_are_those_of_the_window_s_first_step() -> None:
    windows, normalizers = sampler(specs=ALL)
    batch = windows.windows(np.arange(len(windows)))
    row = 0
    assert normalizers.goal is not None
    for number, steps in enumerate(LENGTHS, start=1):
        for t in range(steps):
            mark = 1000 * number + t
            goal = normalizers.goal.unnormalize(batch.conditions["goal"][row])
            final = normalizers.observation.unnormalize(batch.conditions["final_state"][row])
            assert_allclose(goal, [mark + 0.25, mark + 0.5], atol=0.01)
            assert_allclose(final, [1000 * number + steps, -1000 * number - steps], atol=0.01)
            row += 1
    returns = batch.conditions["return"]
    assert (returns.min(), returns.max()) == (0, 1)
    assert (np.diff(returns[8:20, 0]) < 0).all()  # ever less to collect in the longest episode


def test_batches_have_the_declared_shapes_and_are_float32() -> None:
    windows, _ = sampler(specs=ALL)
    batch = windows.sample(6, np.random.default_rng(0))
    shapes = {
        "initial": (6, 2),
        "observations": (6, HORIZON, 2),
        "actions": (6, HORIZON, 1),
        **dict.fromkeys(("rewards", "costs", "terminations", "mask"), (6, HORIZON)),
    }
    assert {name: getattr(batch, name).shape for name in shapes} == shapes
    sizes = {"return": 1, "cost": 1, "goal": 2, "final_state": 2, "now": 1}
    assert {name: value.shape for name, value in batch.conditions.items()} == {
        name: (6, size) for name, size in sizes.items()
    }
    arrays = [getattr(batch, name) for name in shapes] + list(batch.conditions.values())
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}
    assert len(batch) == 6


def centred(padding: str) -> tuple[WindowSampler, Normalizers]:
    source = load_episodes([marked(0, 9, offset=-4.0, goals=False)])  # its data surrounds zero
    return sampler(source, padding=padding)


def test_repeat_pads_with_the_last_observation_and_zero_actions() -> None:
    windows, normalizers = centred("repeat")
    found = decoded(windows.windows([7]), normalizers)
    assert found["observations"][0, :, 0].tolist() == [4, 5, 5, 5, 5]
    assert found["actions"][0, :, 0].tolist() == [3, 4, 0, 0, 0]


def test_zeros_pads_with_zero_observations_and_actions() -> None:
    windows, normalizers = centred("zeros")
    found = decoded(windows.windows([8]), normalizers)  # H - 1 padded steps
    assert found["observations"][0, :, 0].tolist() == [5, 0, 0, 0, 0]
    assert found["actions"][0, :, 0].tolist() == [4, 0, 0, 0, 0]


@pytest.mark.parametrize("kind", ["cdf", "minmax", "gaussian"])
def test_padding_stays_inside_the_range_that_samplers_clip_to(kind: str) -> None:
    windows, normalizers = sampler(kind=kind, padding="zeros")  # all marks are above 1000
    batch = windows.windows(np.arange(len(windows)))
    low, high = normalizers.action.clip_range
    assert (batch.actions >= low - 1e-6).all()
    assert (batch.actions <= high + 1e-6).all()
    assert_allclose(batch.actions[6, 1:, 0], low[0])  # nearest to zero


def hdf5_source(path: Path, lengths: tuple[int, ...] = (40, 25, 60)) -> EpisodeSource:
    """Flat file of random episodes."""
    rng, total = np.random.default_rng(0), sum(lengths)
    ends = np.zeros(total, bool)
    ends[np.cumsum(lengths) - 1] = True
    observations = rng.normal(size=(total, 3))
    following = np.roll(observations, -1, axis=0)
    following[ends] = rng.normal(size=(len(lengths), 3))
    with h5py.File(path, "w") as file:
        file["observations"], file["next_observations"] = observations, following
        file["actions"], file["rewards"] = rng.normal(size=(total, 2)), rng.normal(size=total)
        file["costs"] = rng.integers(0, 2, total).astype(float)
        file["terminals"], file["timeouts"] = np.zeros(total, bool), ends
    return load_episodes(path)


@pytest.mark.parametrize("kind", ["cdf", "minmax", "gaussian"])
@pytest.mark.parametrize("padding", ["repeat", "zeros"])
def test_windows_from_disk_equal_windows_from_memory(
    tmp_path: Path, kind: str, padding: str
) -> None:
    source = hdf5_source(tmp_path / "flat.hdf5")
    specs = (ConditionSpec("return"), ConditionSpec("cost"), ConditionSpec("final_state"))
    options: dict[str, Any] = {"padding": padding, "specs": specs, "horizon": 16}
    memory, _ = sampler(source, kind, **options)
    disk, _ = sampler(source, kind, memory_limit=1000, **options)
    assert (memory.in_memory, disk.in_memory) == (True, False)
    one, other = (w.sample(100, np.random.default_rng(3)) for w in (memory, disk))
    assert 0 < one.mask.mean() < 1
    for field in fields(Batch):
        assert_equal(getattr(one, field.name), getattr(other, field.name))


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, array in one.items():
            assert_array_equal(array, other[key])
    else:
        assert_array_equal(one, other)


def test_disk_windows_read_no_whole_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    source = marked_source()
    windows, _ = sampler(source, memory_limit=0)
    reads = []
    read = source.window

    def window(index: int, start: int, stop: int) -> Episode:
        reads.append((index, start, stop))
        return read(index, start, stop)

    monkeypatch.setattr(source, "window", window)
    windows.windows([2, 9, 22])
    assert reads == [(0, 2, 7), (2, 1, 6), (3, 2, 3)]


def test_costs_are_zero_where_the_data_has_none() -> None:
    without = replace(marked(1, 6, goals=False), costs=None)
    windows, _ = sampler(load_episodes([without]))
    batch = windows.windows([0])
    assert not batch.costs.any()
    assert batch.rewards.all()


def test_normalizers_are_fitted_to_all_sources_together() -> None:
    sources = [marked_source(), second_source()]
    normalizers = fit_normalizers(sources, "minmax")
    ends = np.array([[1000.0, -1000.0], [51_011.0, -51_011.0]])
    assert_allclose(normalizers.observation.normalize(ends), [[-1, 1], [1, -1]])
    assert normalizers.goal is not None
    assert_allclose(normalizers.goal.unnormalize(np.ones(2)), [4003.25, 4003.5])
    assert fit_normalizers(sources[1], "minmax").goal is None


def test_images_are_flattened() -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (9, 2, 4, 4), dtype=np.uint8)
    source = load_episodes([replace(marked(1, 8, goals=False), observations=frames)])
    windows, normalizers = sampler(source, "minmax")
    batch = windows.windows([3])
    found = normalizers.observation.unnormalize(batch.observations[0])
    assert_allclose(found, frames[4:9].reshape(5, 32), atol=1e-3)


def test_contradictions_are_refused() -> None:
    source = marked_source()
    config = WindowConfig(horizon=4, conditions=(ConditionSpec("return"),))
    normalizers = fit_normalizers(source, "minmax")
    with pytest.raises(ConfigError, match=r"declares \['return'\]; pass what fit_conditions"):
        WindowSampler(source, config, normalizers)
    conditions = fit_conditions(source, config, normalizers)
    with pytest.raises(ConfigError, match="conditions: they were fitted for"):
        WindowSampler(source, replace(config, horizon=5), normalizers, conditions)
    with pytest.raises(InputError, match="sources: expected one or several EpisodeSource"):
        WindowSampler([], config, normalizers, conditions)
    with pytest.raises(InputError, match=r"sources: .*\['Episode'\]; use load_episodes"):
        fit_normalizers([marked(1, 3)], "minmax")  # type: ignore[list-item]


def test_an_episode_that_does_not_fit_the_normalizers_is_named() -> None:
    wide = fit_normalizer("minmax", np.random.default_rng(0).normal(size=(9, 3)))
    normalizers = fit_normalizers(marked_source(), "minmax")._replace(observation=wide)
    with pytest.raises(DataError, match=r"episode 0: normalizer: expected .* 3\], got shape"):
        WindowSampler(marked_source(), WindowConfig(horizon=4), normalizers)


@pytest.mark.parametrize("memory_limit", [2**30, 0])
def test_without_padding_windows_end_with_their_episode(memory_limit: int) -> None:
    windows, normalizers = sampler(padding="none", specs=ALL, memory_limit=memory_limit)
    complete = [1000 + step for step in range(3)] + [3000 + step for step in range(8)]
    assert len(windows) == len(complete)
    batch = windows.windows(np.arange(len(windows)))
    assert batch.mask.all()
    found = decoded(batch, normalizers)
    assert_array_equal(found["initial"][:, 0], complete)
    assert_array_equal(found["observations"][:, -1, 0], np.array(complete) + HORIZON)
    assert_allclose(batch.conditions["now"][:, 0], np.array(complete) + 0.125)
    drawn = decoded(windows.sample(500, np.random.default_rng(0)), normalizers)
    assert set(drawn["initial"][:, 0]) == set(complete)


def test_without_padding_sums_beyond_the_window_are_complete() -> None:
    specs = (ConditionSpec("return", horizon=HORIZON + 3),)
    windows, normalizers = sampler(marked_source(goals=False), padding="none", specs=specs)
    batch = windows.windows(np.arange(len(windows)))
    starts = decoded(batch, normalizers)["initial"][:, 0]
    last = [length - HORIZON - 3 for length in LENGTHS]
    complete = [1000 * (i + 1) + t for i, end in enumerate(last) for t in range(end + 1)]
    assert_array_equal(starts, complete)
    padded, _ = sampler(marked_source(goals=False), specs=specs)
    assert len(padded) == sum(LENGTHS)


@pytest.mark.parametrize("memory_limit", [2**30, 0])
def test_only_ends_that_the_environment_made_are_padded(memory_limit: int) -> None:
    source = marked_source(goals=False)  # episodes 1 and 3 end by a time limit
    windows, normalizers = sampler(source, padding="terminal", memory_limit=memory_limit)
    batch = windows.windows(np.arange(len(windows)))
    found = decoded(batch, normalizers)
    starts = [(1, t) for t in range(3)] + [(2, 0)] + [(3, t) for t in range(8)]
    starts += [(4, t) for t in range(3)]
    assert_array_equal(found["initial"][:, 0], [1000 * number + t for number, t in starts])
    for row, (number, t) in enumerate(starts):
        left = LENGTHS[number - 1] - t
        assert batch.mask[row].sum() == min(left, HORIZON)
        assert_array_equal(
            found["observations"][row, :, 0],
            1000 * number + np.minimum(t + 1 + np.arange(HORIZON), LENGTHS[number - 1]),
        )


def test_an_end_that_the_environment_made_completes_every_sum() -> None:
    specs = (ConditionSpec("return", horizon=HORIZON + 3),)
    source = marked_source(goals=False)
    windows, normalizers = sampler(source, padding="terminal", specs=specs)
    batch = windows.windows(np.arange(len(windows)))
    starts = decoded(batch, normalizers)["initial"][:, 0]
    ended = [2000, *range(4000, 4003)]
    assert_array_equal(starts, sorted([*ended, *range(3000, 3005)]))
    raw = [
        sum(0.9**i * (1000 * n + s + 0.125) for i, s in enumerate(range(t, LENGTHS[n - 1])[:8]))
        for n, t in (divmod(int(start), 1000) for start in starts)
    ]
    scaled = (np.array(raw) - min(raw)) / (max(raw) - min(raw))  # of drawn windows alone
    assert_allclose(batch.conditions["return"][:, 0], scaled, atol=1e-6)


def test_an_automatic_horizon_is_half_the_longest_episode_in_bounds() -> None:
    config = WindowConfig(horizon=32, conditions=(ConditionSpec("return", horizon="auto"),))
    for longest, ahead in (20, 32), (100, 50), (1000, 100):
        settled = config.settled(longest, goals=False)
        assert [spec.horizon for spec in settled.conditions] == [ahead]
    with pytest.raises(ConfigError, match=r"horizon='auto' needs .* settled\(longest, .* first"):
        fit_conditions(marked_source(), config, fit_normalizers(marked_source(), "minmax"))
    plain = WindowConfig(conditions=ALL)
    assert plain.settled(1000, goals=False) == plain


def test_conditions_are_kept_where_they_belong() -> None:
    goal, asked, always = (ConditionSpec(kind) for kind in ("goal", "return", "final_state"))
    config = WindowConfig(
        conditions=(replace(goal, when="goals"), replace(asked, when="no_goals"), always)
    )
    assert config.settled(100, goals=True).conditions == (goal, always)
    assert config.settled(100, goals=False).conditions == (asked, always)


def test_a_source_without_a_complete_window_is_refused() -> None:
    sources = [marked_source(goals=False), second_source()]
    with pytest.raises(DataError, match=r"no episode has the 20 steps .*; shorten horizon"):
        sampler(sources, padding="none", horizon=20)
