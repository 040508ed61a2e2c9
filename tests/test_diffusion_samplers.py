"""Samplers against Gaussian data, whose exact denoiser and moments are known."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpd_gym.diffusion.composition import Parts, planner_only
from mpd_gym.diffusion.samplers import (
    Move,
    ddim_move,
    ddpm_posterior,
    make_move,
    multistep,
    noise_to_level,
    normal_noise,
    sample,
    start_noise,
    with_history,
)
from mpd_gym.diffusion.schedule import SCHEDULES, NoiseSchedule, make_schedule
from mpd_gym.errors import ConfigError
from mpd_gym.types import Array, Denoiser, Step

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
        ("cosine", ddpm_posterior, 100, None, 0.055),
        ("cosine", ddpm_posterior, 800, None, 0.008),
        ("cosine", ddpm_posterior, 400, 50, 0.10),
        ("cosine", DDIM, 100, None, 0.03),
        ("cosine", DDIM, 800, None, 0.004),
        ("cosine", DDIM, 400, 50, 0.055),
        ("cosine", DDIM, 100, 10, 0.26),
        ("linear", ddpm_posterior, 800, None, 0.015),
        ("linear", DDIM, 800, None, 0.006),
        ("vp", ddpm_posterior, 800, None, 0.010),
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


@pytest.mark.parametrize("move", [ddpm_posterior, DDIM])
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
    assert errors(schedule, DDIM, 10)[1] > 0.2 and errors(schedule, ddpm_posterior, 10)[1] > 0.3
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


# --- Noise and moves ------------------------------------------------------------------------------


@pytest.mark.parametrize("move", [ddpm_posterior, DDIM])
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
    mean, covariance = moments(schedule, ddpm_posterior)
    np.testing.assert_allclose(found.flatten(1).mean(0), mean, atol=0.02)
    np.testing.assert_allclose(np.cov(found.flatten(1).numpy().T), covariance, atol=0.02)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_ddim_with_full_noise_is_ddpm(name: str) -> None:
    schedule = make_schedule(name, 40)
    noisy, clean = torch.randn(2, 3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    for k, k_next in [(k, k - 1) for k in range(1, 41)] + [(40, 7), (23, 11), (5, 0)]:
        ddpm = ddpm_posterior(noisy[0], clean, k, k_next, schedule)
        ddim = ddim_move(noisy[0], clean, k, k_next, schedule, eta=1.0)
        torch.testing.assert_close(ddim[0], ddpm[0], rtol=1e-9, atol=1e-9)
        assert ddim[1] == pytest.approx(ddpm[1], abs=1e-15)
    for found, expected in zip(
        moments(schedule, functools.partial(ddim_move, eta=1.0)),
        moments(schedule, ddpm_posterior),
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


@pytest.mark.parametrize("move", [ddpm_posterior, DDIM])
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
        (ddpm_posterior, 1.0, 5),
        (ddpm_posterior, 0.0, 0),
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
            exact_denoiser(make_schedule("vp", 3)),
            None,
            make_schedule("vp", 3),
            1,
            ddpm_posterior,
            -1,
        )


def test_equal_generators_give_equal_noise() -> None:
    first, second = (normal_noise((2, 3), torch.Generator().manual_seed(5)) for _ in range(2))
    draws = [first(), first()]
    assert torch.equal(draws[0], second()) and torch.equal(draws[1], second())
    assert not torch.equal(draws[0], draws[1])


def test_a_step_is_a_reverse_move_and_a_draw() -> None:
    schedule = make_schedule("cosine", 8)
    step: Step = planner_only(Parts(exact_denoiser(schedule), None, schedule, 1))
    trajectory = torch.randn(3, 2, 2, dtype=torch.float64)
    epsilon = torch.randn(3, 2, 2, dtype=torch.float64)
    clean = exact_denoiser(schedule)(trajectory, 5)
    posterior = schedule.posterior(5, 2)
    expected = posterior.clean * clean + posterior.noisy * trajectory + posterior.std * epsilon
    torch.testing.assert_close(step(trajectory, 5, 2, lambda: epsilon), expected)
