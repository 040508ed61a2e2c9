"""Guidance: networks as denoisers, with and without their conditions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from denoisers import SCHEDULE, network
from torch import Tensor

from mpd_gym.diffusion import guidance
from mpd_gym.diffusion.composition import Parts, planner_only
from mpd_gym.diffusion.guidance import clean_prediction, guided
from mpd_gym.diffusion.samplers import sample, start_noise
from mpd_gym.errors import ConfigError, InputError
from mpd_gym.models import TrajectoryDenoiser

LEVELS = SCHEDULE.levels()


def conditioning(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    initial, conditions = (
        torch.randn(rows, size, generator=generator, dtype=torch.float64) for size in (2, 3)
    )
    return initial, conditions, torch.ones(rows, 2, dtype=torch.float64)


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


def test_the_exact_prediction_is_converted_back_to_the_clean_trajectory() -> None:
    clean, epsilon = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    noisy = SCHEDULE.signal(4) * clean + SCHEDULE.noise(4) * epsilon
    torch.testing.assert_close(clean_prediction(noisy, epsilon, 4, SCHEDULE, "noise"), clean)
    states = clean_prediction(noisy, epsilon[..., :2], 4, SCHEDULE, "noise")
    torch.testing.assert_close(states, clean[..., :2])
