"""Noise schedules: their numbers, their levels, and the Gaussian moves between levels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpd_gym.diffusion.schedule import SCHEDULES, NoiseSchedule, make_schedule
from mpd_gym.errors import ConfigError


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("num_levels", [2, 10, 50, 100, 1000])
def test_schedules_fall_from_one_to_almost_nothing(name: str, num_levels: int) -> None:
    schedule = make_schedule(name, num_levels)
    assert schedule.num_levels == num_levels
    assert schedule.alphas_bar[0] == 1.0
    assert all(np.diff(schedule.alphas_bar) < 0)
    assert 0 < schedule.alphas_bar[-1] < 0.01
    betas = 1 - np.divide(schedule.alphas_bar[1:], schedule.alphas_bar[:-1])
    assert betas.max() <= 0.999 + 1e-12


def test_the_cosine_schedule_is_the_squared_cosine() -> None:
    schedule = make_schedule("cosine", 100)
    phase = (np.arange(101) / 100 + 0.008) / 1.008 * np.pi / 2
    expected = np.cos(phase) ** 2 / np.cos(phase[0]) ** 2
    np.testing.assert_allclose(schedule.alphas_bar[:100], expected[:100], rtol=1e-12)
    assert schedule.alphas_bar[100] == pytest.approx(1e-3 * expected[99])  # the last beta is cut


def test_the_linear_schedule_is_that_of_ho_at_1000_levels() -> None:
    betas = np.linspace(1e-4, 2e-2, 1000)
    expected = np.cumprod(1 - betas)
    np.testing.assert_allclose(make_schedule("linear", 1000).alphas_bar[1:], expected, rtol=1e-9)


def test_the_vp_schedule_is_the_continuous_process_at_its_levels() -> None:
    share = np.arange(11) / 10
    expected = np.exp(-0.1 * share - 0.5 * 9.9 * share**2)
    np.testing.assert_allclose(make_schedule("vp", 10).alphas_bar, expected, rtol=1e-12)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize(("k", "k_next"), [(1, 0), (7, 6), (20, 3), (50, 49), (50, 1)])
def test_posteriors_equal_brute_force_gaussian_conditioning(name: str, k: int, k_next: int) -> None:
    schedule = make_schedule(name, 50)
    near, far = schedule.alphas_bar[k_next], schedule.alphas_bar[k]
    # (τ^j, τ^k) given τ^0: τ^j = √ᾱ_j τ^0 + n, τ^k = √(ᾱ_k / ᾱ_j) τ^j + n'
    ratio = np.sqrt(far / near)
    clean, noisy = 0.7, -0.4
    mean = np.array([np.sqrt(near), np.sqrt(far)]) * clean
    cov = np.array([[1 - near, ratio * (1 - near)], [ratio * (1 - near), 1 - far]])
    expected_mean = mean[0] + cov[0, 1] / cov[1, 1] * (noisy - mean[1])
    expected_var = cov[0, 0] - cov[0, 1] ** 2 / cov[1, 1]
    posterior = schedule.posterior(k, k_next)
    assert posterior.clean * clean + posterior.noisy * noisy == pytest.approx(expected_mean)
    assert posterior.std**2 == pytest.approx(expected_var, abs=1e-12)


def test_forward_moves_compose() -> None:
    schedule = make_schedule("cosine", 30)
    factor, std = schedule.forward(4, 17)
    assert factor * schedule.signal(4) == pytest.approx(schedule.signal(17))
    variance = (factor * schedule.noise(4)) ** 2 + std**2
    assert variance == pytest.approx(schedule.noise(17) ** 2)
    assert schedule.forward(9, 9) == (1.0, 0.0)


@given(st.integers(2, 300), st.data())
def test_levels_fall_evenly_from_start_to_one(num_levels: int, data: st.DataObject) -> None:
    schedule = make_schedule("vp", num_levels)
    start = data.draw(st.integers(1, num_levels))
    steps = data.draw(st.integers(1, start))
    levels = schedule.levels(steps, start)
    assert len(levels) == steps and levels[0] == start
    gaps = -np.diff(levels)
    assert (gaps >= 1).all()
    if steps > 1:
        assert levels[-1] == 1
        assert gaps.max() - gaps.min() <= 1


@given(st.integers(2, 300), st.sampled_from(sorted(SCHEDULES)), st.data())
def test_levels_even_in_log_snr_fall_from_start_to_one(
    num_levels: int, name: str, data: st.DataObject
) -> None:
    schedule = make_schedule(name, num_levels)
    start = data.draw(st.integers(1, num_levels))
    steps = data.draw(st.integers(1, start))
    levels = schedule.levels(steps, start, spacing="log_snr")
    assert len(levels) == steps and levels[0] == start
    assert (np.diff(levels) < 0).all()
    if steps > 1:
        assert levels[-1] == 1
    if steps == start:
        assert levels == schedule.levels(start=start)


def test_log_snr_spacing_is_even_where_levels_are_dense() -> None:
    schedule = make_schedule("linear", 4000)
    levels = schedule.levels(20, spacing="log_snr")
    ratios = np.array([max(schedule.log_ratio(k), -3.0) for k in levels])
    gaps = np.diff(ratios)
    np.testing.assert_allclose(gaps[:-4], gaps[:-4].mean(), rtol=0.05)
    signal, noise = schedule.signal(700), schedule.noise(700)
    assert schedule.log_ratio(700) == pytest.approx(math.log(signal / noise))


def test_all_levels_are_the_default() -> None:
    schedule = make_schedule("cosine", 5)
    assert schedule.levels() == (5, 4, 3, 2, 1)
    assert schedule.levels(start=3) == (3, 2, 1)
    assert schedule.levels(1) == (5,)


def test_schedule_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'cosine'"):
        make_schedule("cosin", 10)
    with pytest.raises(ConfigError, match="num_levels: expected an integer >= 2; got 1"):
        make_schedule("vp", 1)
    schedule = make_schedule("vp", 10)
    with pytest.raises(ConfigError, match=r"num_steps: expected 1 … 10.*got 11"):
        schedule.levels(11)
    with pytest.raises(ConfigError, match="start: expected a level in 1 … 10; got 0"):
        schedule.levels(start=0)
    with pytest.raises(ConfigError, match="Did you mean 'log_snr'"):
        schedule.levels(spacing="log-snr")
    for values in ((0.9, 0.5), (1.0, 1.0), (1.0, 0.0), (1.0,)):
        with pytest.raises(ConfigError, match="alphas_bar"):
            NoiseSchedule("own", values)


def test_tables_are_the_same_numbers_made_once() -> None:
    schedule = make_schedule("cosine", 20)
    table = schedule.table()
    assert table.dtype == torch.float32
    assert torch.equal(table, torch.tensor(schedule.alphas_bar, dtype=torch.float32))
    assert schedule.table() is table
