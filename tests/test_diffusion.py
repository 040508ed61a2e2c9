from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpd_gym.diffusion import guidance
from mpd_gym.diffusion.composition import Parts, planner_only
from mpd_gym.diffusion.guidance import clean_prediction, guided
from mpd_gym.diffusion.loss import Examples, LossConfig, assemble, denoising_loss
from mpd_gym.diffusion.samplers import (
    Move,
    ddim_move,
    ddpm_move,
    make_move,
    multistep,
    noise_to_level,
    normal_noise,
    sample,
    start_noise,
    with_history,
)
from mpd_gym.diffusion.schedule import SCHEDULES, NoiseSchedule, make_schedule
from mpd_gym.errors import ConfigError, InputError
from mpd_gym.models import DenoiserConfig, TrajectoryDenoiser, UnetConfig
from mpd_gym.types import Array, Batch, Denoiser, Step

# --- Schedules ------------------------------------------------------------------------------------


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


# --- Gaussian data with its exact denoiser --------------------------------------------------------

MEAN = np.array([0.3, -0.6, 0.1, 0.5])
FACTOR = np.array([[0.8, 0, 0, 0], [0.5, 0.3, 0, 0], [-0.2, 0.4, 0.6, 0], [0.1, 0, 0.2, 0.25]])
COVARIANCE = FACTOR @ FACTOR.T


def exact_denoiser(schedule: NoiseSchedule) -> Denoiser:
    """E[τ^0 | τ^k] for τ^0 ~ N(MEAN, COVARIANCE), on trajectories [M, 2, 2]."""

    def denoise(trajectory: Tensor, k: int) -> Tensor:
        kept = schedule.alphas_bar[k]
        gain = (
            np.sqrt(kept) * COVARIANCE @ np.linalg.inv(kept * COVARIANCE + (1 - kept) * np.eye(4))
        )
        offset = MEAN - gain @ MEAN * np.sqrt(kept)
        flat = trajectory.flatten(1) @ torch.from_numpy(gain.T) + torch.from_numpy(offset)
        return flat.reshape(trajectory.shape)

    return denoise


class Impulses:
    """Noise of which each entry is one in a single row, and row 0 none at all.

    The sampler is affine in its noise when the denoiser is affine, so one run over these rows
    yields the mean and the factors of the covariance of its samples without sampling error.
    """

    def __init__(self, draws: int) -> None:
        self.rows, self.used = 1 + 4 * draws, 0

    def __call__(self) -> Tensor:
        noise = torch.zeros(self.rows, 4, dtype=torch.float64)
        first = 1 + 4 * self.used
        noise[first : first + 4] = torch.eye(4)
        self.used += 1
        return noise.reshape(-1, 2, 2)


def moments(
    schedule: NoiseSchedule,
    move: Move,
    num_steps: int | None = None,
    temperature: float = 1.0,
) -> tuple[Array, Array]:
    """Exact mean and covariance of what the sampler returns."""
    levels = schedule.levels(num_steps)
    noise = Impulses(len(levels))
    parts = Parts(exact_denoiser(schedule), None, schedule, 1, move, temperature)
    rows = sample(planner_only(parts), start_noise(noise, temperature), levels, noise)
    flat = rows.flatten(1).numpy()
    deviations = flat[1:] - flat[0]
    return flat[0], deviations.T @ deviations


def errors(
    schedule: NoiseSchedule, move: Move, num_steps: int | None = None
) -> tuple[float, float]:
    """Largest error of the mean in standard deviations, relative error of the covariance."""
    mean, covariance = moments(schedule, move, num_steps)
    deviations = np.abs(mean - MEAN) / np.sqrt(np.diag(COVARIANCE))
    relative = np.linalg.norm(covariance - COVARIANCE) / np.linalg.norm(COVARIANCE)
    return float(deviations.max()), float(relative)


DDIM = functools.partial(ddim_move, eta=0.0)


@pytest.mark.parametrize(
    ("name", "move", "num_levels", "num_steps", "bound"),
    [
        ("cosine", ddpm_move, 100, None, 0.055),
        ("cosine", ddpm_move, 800, None, 0.008),
        ("cosine", ddpm_move, 400, 50, 0.10),
        ("cosine", DDIM, 100, None, 0.03),
        ("cosine", DDIM, 800, None, 0.004),
        ("cosine", DDIM, 400, 50, 0.055),
        ("cosine", DDIM, 100, 10, 0.26),
        ("linear", ddpm_move, 800, None, 0.015),
        ("linear", DDIM, 800, None, 0.006),
        ("vp", ddpm_move, 800, None, 0.010),
        ("vp", DDIM, 800, None, 0.004),
    ],
)
def test_exact_denoisers_recover_mean_and_covariance(
    name: str, move: Move, num_levels: int, num_steps: int | None, bound: float
) -> None:
    mean, covariance = errors(make_schedule(name, num_levels), move, num_steps)
    # the noisiest level of "vp" keeps 8 % of the mean, which a start from pure noise lacks
    assert mean < (0.05 if name == "vp" else 0.005)
    assert covariance < bound


@pytest.mark.parametrize("move", [ddpm_move, DDIM])
def test_samplers_converge_with_order_one(move: Move) -> None:
    found = [errors(make_schedule("linear", levels), move)[1] for levels in (100, 200, 400)]
    assert found[0] / found[1] == pytest.approx(2, abs=0.4)
    assert found[1] / found[2] == pytest.approx(2, abs=0.4)


# --- DPM-Solver++ ---------------------------------------------------------------------------------


def flow_error(sampler: str, num_steps: int) -> float:
    """Error of the probability-flow ODE's solution at level 1, in relative covariance.

    For Gaussian data of covariance C the ODE moves along √(ᾱC + (1 − ᾱ)I): its solution is exact.
    """
    schedule = make_schedule("linear", 4000)
    start = 3000  # in the dense part of the schedule, where rounded levels are evenly spaced
    levels = schedule.levels(num_steps, start, spacing="log_snr")
    denoiser = with_history(sampler, exact_denoiser(schedule), levels, schedule)
    noise, ends = Impulses(1), {}
    parts = Parts(denoiser, None, schedule, 1, make_move(sampler))
    sample(planner_only(parts), noise(), levels, noise, callback=ends.__setitem__)
    rows = ends[1].flatten(1).numpy()
    found = (rows[1:] - rows[0]).T @ (rows[1:] - rows[0])
    first, last = (
        kept * COVARIANCE + (1 - kept) * np.eye(4)
        for kept in (schedule.alphas_bar[start], schedule.alphas_bar[1])
    )
    exact = last @ np.linalg.inv(first)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm++", 2)])
def test_deterministic_samplers_solve_the_flow_with_their_order(sampler: str, order: int) -> None:
    steps = np.array([10, 20, 40, 80])
    errors = [flow_error(sampler, count) for count in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(-order, abs=0.25)


def multistep_errors(num_steps: int, eta: float = 0.0, spacing: str = "log_snr") -> float:
    schedule = make_schedule("cosine", 50)
    levels = schedule.levels(num_steps, spacing=spacing)
    noise = Impulses(len(levels))
    denoiser = multistep(exact_denoiser(schedule), levels, schedule)
    parts = Parts(denoiser, None, schedule, 1, make_move("dpm++", eta))
    rows = sample(planner_only(parts), start_noise(noise), levels, noise).flatten(1).numpy()
    found = (rows[1:] - rows[0]).T @ (rows[1:] - rows[0])
    return float(np.linalg.norm(found - COVARIANCE) / np.linalg.norm(COVARIANCE))


def test_few_multistep_moves_recover_the_covariance_that_few_others_do_not() -> None:
    schedule = make_schedule("cosine", 50)
    assert errors(schedule, DDIM, 10)[1] > 0.2 and errors(schedule, ddpm_move, 10)[1] > 0.3
    assert multistep_errors(10) < 0.04
    assert multistep_errors(10, eta=1.0) < 0.1  # of the SDE
    assert multistep_errors(20) < 0.01
    assert multistep_errors(10, spacing="even") > 2 * multistep_errors(10)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_multistep_move_is_the_papers_formula(eta: float) -> None:
    schedule = make_schedule("cosine", 50)
    generator = torch.Generator().manual_seed(0)
    noisy, before, clean = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    answers = iter((before, clean))
    denoise = multistep(lambda trajectory, k: next(answers), (40, 31, 17), schedule)
    denoise(noisy, 40)
    mean, std = make_move("dpm++", eta)(noisy, denoise(noisy, 31), 31, 17, schedule)
    lambdas = [math.log(schedule.signal(k) / schedule.noise(k)) for k in (40, 31, 17)]
    last, coming = np.diff(lambdas)
    data = clean + coming / (2 * last) * (clean - before)  # D of Algorithm 2, r = h' / h
    kept, near, far = schedule.signal(17), schedule.noise(17), schedule.noise(31)
    if eta == 0:
        expected = near / far * noisy - kept * math.expm1(-coming) * data
    else:  # of SDE-DPM-Solver++(2M), appendix
        expected = near / far * math.exp(-coming) * noisy - kept * math.expm1(-2 * coming) * data
    torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-10)
    assert std == pytest.approx(near * math.sqrt(-math.expm1(-2 * coming)) * eta)


def test_first_and_last_multistep_moves_are_of_first_order() -> None:
    schedule = make_schedule("cosine", 20)
    denoise = exact_denoiser(schedule)
    noisy = torch.randn(5, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bound = multistep(denoise, (15, 8, 1), schedule)
    assert torch.equal(bound(noisy, 15), denoise(noisy, 15))
    assert not torch.allclose(bound(noisy, 8), denoise(noisy, 8))
    assert torch.equal(bound(noisy, 1), denoise(noisy, 1))
    for levels in ((20,), (7, 1)):  # so that short passes are DDIM's
        plans = [
            sample(
                planner_only(
                    Parts(
                        with_history(name, denoise, levels, schedule),
                        None,
                        schedule,
                        1,
                        make_move(name),
                    )
                ),
                noisy,
                levels,
                lambda: noisy,
            )
            for name in ("ddim", "dpm++")
        ]
        assert torch.equal(*plans)


def test_a_guess_from_pure_noise_is_not_extrapolated() -> None:
    schedule = make_schedule("cosine", 20)
    denoise = exact_denoiser(schedule)
    noisy = torch.ones(1, 2, 2, dtype=torch.float64)
    bound = multistep(denoise, (20, 15, 8, 1), schedule)
    assert schedule.log_ratio(20) < -3 < schedule.log_ratio(15)
    bound(noisy, 20)
    assert torch.equal(bound(noisy, 15), denoise(noisy, 15))
    assert not torch.equal(bound(noisy, 8), denoise(noisy, 8))


def test_two_calls_at_a_level_extrapolate_alike_and_the_last_is_remembered() -> None:
    schedule = make_schedule("cosine", 20)
    answers = iter(torch.arange(1.0, 6.0))
    bound = multistep(lambda trajectory, k: next(answers), (15, 8, 4, 1), schedule)
    found = [bound(torch.zeros(1), k).item() for k in (15, 8, 8, 4)]
    factors = {
        k: (schedule.log_ratio(after) - schedule.log_ratio(k))
        / (schedule.log_ratio(k) - schedule.log_ratio(before))
        / 2
        for before, k, after in ((15, 8, 4), (8, 4, 1))
    }
    expected = [1.0, 2 + factors[8] * (2 - 1), 3 + factors[8] * (3 - 1), 4 + factors[4] * (4 - 3)]
    assert found == pytest.approx(expected)


def test_a_history_with_a_gap_is_not_used() -> None:
    schedule = make_schedule("cosine", 20)
    denoise = exact_denoiser(schedule)
    noisy = torch.ones(1, 2, 2, dtype=torch.float64)
    bound = multistep(denoise, (15, 8, 4, 1), schedule)
    bound(noisy, 15)
    assert torch.equal(bound(noisy, 4), denoise(noisy, 4))


def test_passes_do_not_share_their_histories() -> None:
    schedule = make_schedule("cosine", 20)
    levels = schedule.levels(6, spacing="log_snr")
    start = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()

    def step() -> Step:
        denoiser = multistep(exact_denoiser(schedule), levels, schedule)
        return planner_only(Parts(denoiser, None, schedule, 1, make_move("dpm++")))

    alone = [sample(step(), row, levels, lambda: start[0]) for row in start]
    steps, rows = [step(), step()], list(start)
    for k, k_next in zip(levels, (*levels[1:], 0), strict=True):  # two passes, turn by turn
        rows = [one(row, k, k_next, lambda: start[0]) for one, row in zip(steps, rows, strict=True)]
    for row, expected in zip(rows, alone, strict=True):
        assert torch.equal(row, expected)


def test_only_multistep_samplers_keep_a_history() -> None:
    schedule = make_schedule("cosine", 20)
    denoise = exact_denoiser(schedule)
    for name in ("ddpm", "ddim"):
        assert with_history(name, denoise, (5, 1), schedule) is denoise
    assert with_history("dpm++", denoise, (5, 1), schedule) is not denoise


@pytest.mark.parametrize("move", [ddpm_move, DDIM])
def test_temperature_scales_the_covariance_and_leaves_the_mean(move: Move) -> None:
    schedule = make_schedule("cosine", 50)
    mean, covariance = moments(schedule, move)
    for temperature in (0.0, 0.25, 2.0):
        scaled = moments(schedule, move, temperature=temperature)
        np.testing.assert_allclose(scaled[0], mean, rtol=1e-12)
        np.testing.assert_allclose(scaled[1], temperature * covariance, rtol=1e-9, atol=1e-15)


def test_random_noise_gives_the_same_moments() -> None:
    schedule = make_schedule("cosine", 30)
    parts = Parts(exact_denoiser(schedule), None, schedule, 1)
    noise = normal_noise((40_000, 2, 2), torch.Generator().manual_seed(0), dtype=torch.float64)
    found = sample(planner_only(parts), start_noise(noise), schedule.levels(), noise)
    mean, covariance = moments(schedule, ddpm_move)
    np.testing.assert_allclose(found.flatten(1).mean(0), mean, atol=0.02)
    np.testing.assert_allclose(np.cov(found.flatten(1).numpy().T), covariance, atol=0.02)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_ddim_with_full_noise_is_ddpm(name: str) -> None:
    schedule = make_schedule(name, 40)
    noisy, clean = torch.randn(2, 3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    for k, k_next in [(k, k - 1) for k in range(1, 41)] + [(40, 7), (23, 11), (5, 0)]:
        ddpm = ddpm_move(noisy[0], clean, k, k_next, schedule)
        ddim = ddim_move(noisy[0], clean, k, k_next, schedule, eta=1.0)
        torch.testing.assert_close(ddim[0], ddpm[0], rtol=1e-9, atol=1e-9)
        assert ddim[1] == pytest.approx(ddpm[1], abs=1e-15)
    for found, expected in zip(
        moments(schedule, functools.partial(ddim_move, eta=1.0)),
        moments(schedule, ddpm_move),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_keeps_the_marginal_of_the_next_level(eta: float) -> None:
    schedule = make_schedule("cosine", 40)
    generator = torch.Generator().manual_seed(0)
    clean = torch.full((200_000,), 0.7, dtype=torch.float64)
    epsilon = torch.randn(200_000, generator=generator, dtype=torch.float64)
    noisy = schedule.signal(30) * clean + schedule.noise(30) * epsilon
    mean, std = ddim_move(noisy, clean, 30, 12, schedule, eta=eta)
    moved = mean + std * torch.randn(200_000, generator=generator, dtype=torch.float64)
    assert moved.mean() == pytest.approx(schedule.signal(12) * 0.7, abs=5e-3)
    assert moved.std() == pytest.approx(schedule.noise(12), rel=1e-2)


@pytest.mark.parametrize("move", [ddpm_move, DDIM])
def test_the_last_step_is_the_clean_prediction_without_noise(move: Move) -> None:
    clean = torch.rand(3, 4)
    mean, std = move(torch.randn(3, 4), clean, 6, 0, make_schedule("cosine", 10))
    torch.testing.assert_close(mean, clean)
    assert std == 0


def test_noise_is_drawn_where_there_is_variance_only() -> None:
    schedule = make_schedule("cosine", 6)
    draws = 0

    def noise() -> Tensor:
        nonlocal draws
        draws += 1
        return torch.zeros(1, 2, 2, dtype=torch.float64)

    for move, temperature, expected in (
        (ddpm_move, 1.0, 5),
        (ddpm_move, 0.0, 0),
        (DDIM, 1.0, 0),
    ):
        draws = 0
        parts = Parts(exact_denoiser(schedule), None, schedule, 1, move, temperature)
        sample(planner_only(parts), torch.zeros(1, 2, 2).double(), schedule.levels(), noise)
        assert draws == expected


@pytest.mark.parametrize("k", [0, 3, 19])
def test_noise_to_level_has_the_moments_of_that_level(k: int) -> None:
    schedule = make_schedule("cosine", 20)
    noise = normal_noise((100_000,), torch.Generator().manual_seed(0))
    clean = torch.full((100_000,), 0.5)
    noisy = noise_to_level(clean, k, schedule, noise, temperature=0.25)
    assert noisy.mean() == pytest.approx(schedule.signal(k) * 0.5, abs=0.01)
    assert noisy.std() == pytest.approx(0.5 * schedule.noise(k), rel=0.01, abs=1e-6)


def test_a_warm_start_from_the_last_level_is_a_full_start() -> None:
    schedule = make_schedule("vp", 20)

    def noise() -> Tensor:
        return torch.arange(4.0)

    warm = noise_to_level(torch.ones(4), 20, schedule, noise, temperature=0.5)
    assert torch.equal(warm, start_noise(noise, 0.5))
    with pytest.raises(ConfigError, match="k: expected a level in 0 … 20; got 21"):
        noise_to_level(torch.ones(4), 21, schedule, noise)


def test_the_loop_visits_the_levels_and_reports_them() -> None:
    visited, reported = [], []

    def step(trajectory: Tensor, k: int, k_next: int, noise: Any) -> Tensor:
        visited.append((k, k_next))
        return trajectory + 1

    result = sample(
        step,
        torch.zeros(1),
        (9, 4, 1),
        lambda: torch.zeros(1),
        callback=lambda k, trajectory: reported.append((k, trajectory.item())),
    )
    assert visited == [(9, 4), (4, 1), (1, 0)]
    assert reported == [(4, 1.0), (1, 2.0), (0, 3.0)]
    assert result.item() == 3
    for wrong in ((1, 4), (3, 3), (2, 0)):
        with pytest.raises(ConfigError, match="falling levels"):
            sample(step, torch.zeros(1), wrong, lambda: torch.zeros(1))


def test_sampler_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'ddim'"):
        make_move("dim")
    with pytest.raises(ConfigError, match=r"eta: expected a value in \[0, 1\]; got 1.5"):
        make_move("ddim", 1.5)
    with pytest.raises(ConfigError, match=r"temperature.*got -1"):
        Parts(
            exact_denoiser(make_schedule("vp", 3)), None, make_schedule("vp", 3), 1, ddpm_move, -1
        )


def test_equal_generators_give_equal_noise() -> None:
    first, second = (normal_noise((2, 3), torch.Generator().manual_seed(5)) for _ in range(2))
    draws = [first(), first()]
    assert torch.equal(draws[0], second()) and torch.equal(draws[1], second())
    assert not torch.equal(draws[0], draws[1])


# --- Guidance -------------------------------------------------------------------------------------

CONDITIONS = (("return", 1), ("goal", 2))


def network(prediction: str = "noise", **changes: Any) -> TrajectoryDenoiser:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "observation_dim": 2,
        "action_dim": 1,
        "horizon": 4,
        "conditions": CONDITIONS,
        "unet": UnetConfig(8, (1, 2), groups=4),
    }
    return TrajectoryDenoiser(DenoiserConfig(**(config | changes))).double()


def conditioning(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    initial, conditions = (
        torch.randn(rows, size, generator=generator, dtype=torch.float64) for size in (2, 3)
    )
    return initial, conditions, torch.ones(rows, 2, dtype=torch.float64)


SCHEDULE = make_schedule("cosine", 10)
LEVELS = SCHEDULE.levels()


def output(
    model: TrajectoryDenoiser,
    trajectory: Tensor,
    k: int,
    given: tuple[Tensor, Tensor, Tensor],
    present: float,
) -> Tensor:
    initial, conditions, flags = given
    level = torch.full((len(trajectory),), k)
    predicted: Tensor = model(trajectory, level, initial, conditions, flags * present)
    return predicted


@pytest.mark.parametrize("role", ["trajectory", "observations"])
@pytest.mark.parametrize("prediction", ["noise", "x0"])
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 2.5])
def test_guidance_is_affine_between_the_halves(role: str, prediction: str, scale: float) -> None:
    model = network(output=role)
    given = conditioning(3)
    trajectory = torch.randn(3, 4, 3, dtype=torch.float64)
    denoiser = guided(
        model, SCHEDULE, *given, scale, levels=LEVELS, prediction=prediction, clip=None
    )
    for k in (10, 4, 1):
        with_condition, without = (output(model, trajectory, k, given, p) for p in (1.0, 0.0))
        mixed = without + scale * (with_condition - without)
        columns = mixed.shape[-1]
        expected = mixed
        if prediction == "noise":
            kept = SCHEDULE.alphas_bar[k]
            expected = (trajectory[..., :columns] - math.sqrt(1 - kept) * mixed) / math.sqrt(kept)
        torch.testing.assert_close(denoiser(trajectory, k), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("scale", "rows"), [(0.0, 3), (1.0, 3), (2.0, 6)])
def test_one_half_is_skipped_where_it_has_no_say(scale: float, rows: int) -> None:
    model = network()
    sizes = []
    model.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    denoiser = guided(model, SCHEDULE, *conditioning(3), scale, levels=LEVELS)
    denoiser(torch.zeros(3, 4, 3).double(), 5)
    assert sizes == [rows]


def test_a_network_without_conditions_is_not_guided() -> None:
    model = network(conditions=())
    initial, _, _ = conditioning(3)
    empty = torch.zeros(3, 0, dtype=torch.float64)
    trajectory = torch.randn(3, 4, 3, dtype=torch.float64)
    plain, scaled = (
        guided(model, SCHEDULE, initial, empty, empty, scale, levels=LEVELS) for scale in (1.0, 3.0)
    )
    assert torch.equal(plain(trajectory, 5), scaled(trajectory, 5))


def test_candidates_share_the_conditioning_of_their_environment() -> None:
    model = network()
    given = conditioning(2)
    trajectory = torch.randn(6, 4, 3, dtype=torch.float64)
    shared = guided(model, SCHEDULE, *given, 2.0, levels=LEVELS)
    initial, conditions, present = (value.repeat_interleave(3, dim=0) for value in given)
    apart = guided(model, SCHEDULE, initial, conditions, present, 2.0, levels=LEVELS)
    torch.testing.assert_close(shared(trajectory, 7), apart(trajectory, 7), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("limit", "few", "chunk"), [(0, 1, 1), (0, 8, 2), (50_000, 1, 4), (2**28, 1, 10)]
)
def test_conditioning_is_prepared_once_and_little_memory_changes_nothing(
    limit: int, few: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guidance, "FEW_ROWS", few)
    model, given = network(), conditioning(2)
    trajectory = torch.randn(2, 4, 3, dtype=torch.float64)
    alone = [guided(model, SCHEDULE, *given, 2.0, levels=[k])(trajectory, k) for k in LEVELS]
    rows: list[int] = []
    embed = model.embed

    def counted(k: Tensor, *rest: Tensor) -> Tensor:
        rows.append(len(k))
        return embed(k, *rest)

    monkeypatch.setattr(model, "embed", counted)
    denoiser = guided(model, SCHEDULE, *given, 2.0, levels=LEVELS, modulation_bytes=limit)
    assert sum(rows) == 4 * chunk  # both halves of two environments, before the first call
    for k, expected in zip(LEVELS, alone, strict=True):
        torch.testing.assert_close(denoiser(trajectory, k), expected, rtol=1e-9, atol=1e-9)
    assert sum(rows) == 4 * len(LEVELS)
    assert max(rows) <= 4 * chunk


@pytest.mark.parametrize(
    "clip",
    [(-0.5, 0.25), (torch.tensor([-0.5, -0.1, -9.0]), torch.tensor([0.25, 0.2, 9.0]))],
)
@pytest.mark.parametrize("role", ["trajectory", "observations"])
def test_clean_trajectories_are_cut_to_the_range(clip: Any, role: str) -> None:
    model = network(output=role)
    given = conditioning(3)
    trajectory = 5 * torch.randn(3, 4, 3, dtype=torch.float64)
    free, cut = (
        guided(model, SCHEDULE, *given, 1.0, levels=LEVELS, clip=bounds)(trajectory, 10)
        for bounds in (None, clip)
    )
    low, high = (np.broadcast_to(np.asarray(bound), 3)[: free.shape[-1]] for bound in clip)
    np.testing.assert_array_equal(cut.detach(), np.clip(free.detach().numpy(), low, high))
    assert not torch.equal(cut, free)


def test_guidance_mistakes_are_named() -> None:
    model, given = network(), conditioning(2)
    with pytest.raises(ConfigError, match=r"guidance_scale.*got -1"):
        guided(model, SCHEDULE, *given, -1.0, levels=LEVELS)
    with pytest.raises(ConfigError, match="prediction: expected one of noise, x0; got 'epsilon'"):
        guided(model, SCHEDULE, *given, 1.0, levels=LEVELS, prediction="epsilon")
    with pytest.raises(ConfigError, match="levels: expected at least one"):
        guided(model, SCHEDULE, *given, 1.0, levels=())
    with pytest.raises(InputError, match=r"expected one of the levels \[5, 1\]; got 4"):
        guided(model, SCHEDULE, *given, 1.0, levels=(5, 1))(torch.zeros(2, 4, 3).double(), 4)


def test_batched_sampling_equals_single() -> None:
    model = network().float()
    given = [value.float() for value in conditioning(4)]
    draws = torch.randn(20, 4, 4, 3, generator=torch.Generator().manual_seed(0))

    def plan(rows: slice) -> Tensor:
        stream = iter(draws)
        initial, conditions, present = (value[rows] for value in given)
        denoiser = guided(model, SCHEDULE, initial, conditions, present, 1.5, levels=LEVELS)
        step = planner_only(Parts(denoiser, None, SCHEDULE, 2))

        def noise() -> Tensor:
            drawn: Tensor = next(stream)[rows]
            return drawn

        return sample(step, start_noise(noise), LEVELS, noise)

    single = torch.cat([plan(slice(i, i + 1)) for i in range(4)])
    torch.testing.assert_close(plan(slice(None)), single, rtol=1e-5, atol=1e-5)


# --- Loss -----------------------------------------------------------------------------------------


def batch(size: int = 6, horizon: int = 4, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return rng.normal(size=(size, *shape)).astype(np.float32)

    mask = np.ones((size, horizon), np.float32)
    mask[0, 2:] = 0
    return Batch(
        initial=normal(2),
        observations=normal(horizon, 2),
        actions=normal(horizon, 1),
        conditions={"return": normal(1), "goal": normal(2), "cost": normal(1)},
        rewards=normal(horizon),
        costs=normal(horizon),
        terminations=np.zeros((size, horizon), np.float32),
        mask=mask,
    )


def test_film_examples_hold_the_next_state_and_the_action() -> None:
    windows = batch()
    examples = assemble(windows, ["goal", "return"])
    np.testing.assert_array_equal(examples.trajectory[..., :2], windows.observations)
    np.testing.assert_array_equal(examples.trajectory[..., 2:], windows.actions)
    np.testing.assert_array_equal(examples.conditions[:, :2], windows.conditions["goal"])
    np.testing.assert_array_equal(examples.conditions[:, 2:], windows.conditions["return"])
    np.testing.assert_array_equal(examples.recorded, np.repeat(windows.mask[..., None], 3, axis=-1))
    assert examples.present.shape == (6, 2) and (examples.present == 1).all()
    assert not examples.fixed.any()
    assert assemble(windows, []).conditions.shape == (6, 0)


def test_inpainted_examples_start_with_the_initial_state() -> None:
    windows = batch()
    examples = assemble(windows, [], initial_state="inpaint")
    np.testing.assert_array_equal(examples.trajectory[:, 0, :2], windows.initial)
    np.testing.assert_array_equal(examples.trajectory[:, 1:, :2], windows.observations[:, :-1])
    np.testing.assert_array_equal(examples.trajectory[..., 2:], windows.actions)
    assert examples.fixed.nonzero().tolist() == [[0, 0], [0, 1]]
    # two recorded steps: x_0, x_1, x_2 and u_0, u_1 are known
    assert examples.recorded[0, :, 0].tolist() == [1, 1, 1, 0]
    assert examples.recorded[0, :, 2].tolist() == [1, 1, 0, 0]
    with pytest.raises(InputError, match=r"\['speed'\] missing"):
        assemble(windows, ["speed"])


class Recorder:
    """Network that keeps its inputs and predicts a constant."""

    def __init__(self, columns: int = 3, value: float = 0.0) -> None:
        self.columns, self.value = columns, value

    def __call__(
        self, trajectory: Tensor, k: Tensor, initial: Tensor, conditions: Tensor, present: Tensor
    ) -> Tensor:
        self.noisy, self.k, self.present = trajectory, k, present
        constant: Tensor = torch.full_like(trajectory[..., : self.columns], self.value)
        return constant


def drawn(examples: Examples, seed: int) -> Tensor:
    """The noise that the loss draws: second use of its generator."""
    generator = torch.Generator().manual_seed(seed)
    torch.randint(1, 11, (len(examples.initial),), generator=generator)
    return torch.randn(examples.trajectory.shape, generator=generator)


@pytest.mark.parametrize("columns", [3, 2])
@pytest.mark.parametrize("prediction", ["noise", "x0"])
@pytest.mark.parametrize("initial_state", ["film", "inpaint"])
def test_the_loss_is_the_weighted_mean_squared_error(
    columns: int, prediction: Any, initial_state: str
) -> None:
    examples = assemble(batch(), ["goal"], initial_state=initial_state)
    config = LossConfig(prediction, first_action_weight=7.0, padding_weight=0.5)
    recorder = Recorder(columns, 0.1)
    loss = denoising_loss(recorder, examples, SCHEDULE, config, torch.Generator().manual_seed(3))
    epsilon = drawn(examples, 3)
    kept = torch.tensor(SCHEDULE.alphas_bar)[recorder.k][:, None, None]
    noisy = kept.sqrt() * examples.trajectory + (1 - kept).sqrt() * epsilon
    weights = np.where(examples.recorded > 0, 1.0, 0.5)
    weights[:, 0, 2] *= 7
    if initial_state == "inpaint":
        noisy[:, 0, :2] = examples.trajectory[:, 0, :2]
        weights[:, 0, :2] = 0
    target = epsilon if prediction == "noise" else examples.trajectory
    expected = (weights * (0.1 - target.numpy()) ** 2)[..., :columns].mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(recorder.noisy, noisy.float())


def test_levels_and_dropout_have_their_frequencies() -> None:
    size = 20_000
    zeros = torch.zeros(size, 1, 2)
    examples = Examples(
        zeros,
        zeros[:, 0, :1],
        torch.ones(size, 2),
        torch.ones(size, 2),
        torch.ones_like(zeros),
        torch.zeros(1, 2, dtype=torch.bool),
        torch.zeros(1, 2, dtype=torch.bool),
    )
    recorder = Recorder(2)
    denoising_loss(recorder, examples, SCHEDULE, LossConfig(), torch.Generator().manual_seed(0))
    counts = np.bincount(recorder.k.numpy(), minlength=12)
    assert counts[0] == 0 and counts[11] == 0
    np.testing.assert_allclose(counts[1:11] / size, 0.1, atol=0.01)
    assert torch.equal(recorder.present[:, 0], recorder.present[:, 1])  # all or nothing
    assert 1 - recorder.present[:, 0].mean() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(("dropout", "present"), [(0.0, 1.0), (1.0, 0.0)])
def test_dropout_at_its_ends_is_certain(dropout: float, present: float) -> None:
    recorder = Recorder()
    config = LossConfig(condition_dropout=dropout)
    examples = assemble(batch(), ["goal"])
    denoising_loss(recorder, examples, SCHEDULE, config, torch.Generator().manual_seed(0))
    assert (recorder.present == present).all()


def test_equal_generators_give_equal_losses() -> None:
    examples, model = assemble(batch(), ["return", "goal"]), network().float()
    first, second, other = (
        denoising_loss(
            model, examples, SCHEDULE, LossConfig(), torch.Generator().manual_seed(seed)
        ).item()
        for seed in (0, 0, 1)
    )
    assert first == second != other


def test_a_loss_needs_to_know_what_is_predicted() -> None:
    unsettled = LossConfig("auto")
    with pytest.raises(ConfigError, match="prediction"):
        denoising_loss(
            network().float(), assemble(batch(), ["return", "goal"]), SCHEDULE, unsettled,
            torch.Generator().manual_seed(0),
        )  # fmt: skip


def test_padding_can_be_left_out() -> None:
    windows = batch()
    garbage = dataclasses.replace(
        windows, observations=windows.observations + 100 * (1 - windows.mask[..., None])
    )
    config = LossConfig("x0", padding_weight=0.0)
    losses = [
        denoising_loss(
            Recorder(), assemble(data, []), SCHEDULE, config, torch.Generator().manual_seed(0)
        )
        for data in (windows, garbage)
    ]
    assert torch.equal(losses[0], losses[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction": "nois"}, "Did you mean 'noise'"),
        ({"condition_dropout": 1.2}, "condition_dropout.*got 1.2"),
        ({"first_action_weight": -1.0}, "first_action_weight.*got -1"),
        ({"padding_weight": math.nan}, "padding_weight.*got nan"),
    ],
)
def test_wrong_loss_configurations_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LossConfig(**changes)


def test_a_loss_configuration_survives_json() -> None:
    config = LossConfig("x0", 5.0, 0.1, 0.0)
    assert LossConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_the_exact_prediction_is_converted_back_to_the_clean_trajectory() -> None:
    clean, epsilon = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    noisy = SCHEDULE.signal(4) * clean + SCHEDULE.noise(4) * epsilon
    torch.testing.assert_close(clean_prediction(noisy, epsilon, 4, SCHEDULE, "noise"), clean)
    states = clean_prediction(noisy, epsilon[..., :2], 4, SCHEDULE, "noise")
    torch.testing.assert_close(states, clean[..., :2])


@pytest.mark.parametrize("prediction", ["noise", "x0"])
def test_the_loss_falls_on_toy_data(prediction: Any) -> None:
    rng = np.random.default_rng(0)
    model = network(conditions=(("goal", 2),), unet=UnetConfig(16, (1, 2), groups=4)).float()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(0)
    times = np.linspace(0, 1, 5)[None, :, None]
    losses = []
    for _ in range(100):
        start, goal = rng.uniform(-1, 1, (2, 32, 1, 2)).astype(np.float32)
        line = (start + times * (goal - start)).astype(np.float32)
        windows = dataclasses.replace(
            batch(32),
            initial=line[:, 0],
            observations=line[:, 1:],
            actions=np.diff(line, axis=1)[..., :1],
            conditions={"goal": goal[:, 0]},
        )
        loss = denoising_loss(
            model, assemble(windows, ["goal"]), SCHEDULE, LossConfig(prediction), generator
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])


def test_a_step_is_a_reverse_move_and_a_draw() -> None:
    schedule = make_schedule("cosine", 8)
    step: Step = planner_only(Parts(exact_denoiser(schedule), None, schedule, 1))
    trajectory = torch.randn(3, 2, 2, dtype=torch.float64)
    epsilon = torch.randn(3, 2, 2, dtype=torch.float64)
    clean = exact_denoiser(schedule)(trajectory, 5)
    posterior = schedule.posterior(5, 2)
    expected = posterior.clean * clean + posterior.noisy * trajectory + posterior.std * epsilon
    torch.testing.assert_close(step(trajectory, 5, 2, lambda: epsilon), expected)
