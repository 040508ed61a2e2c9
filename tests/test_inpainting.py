"""Inpainting holds known entries at every level, and changes the rest as conditioning does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_gaussian import (
    COVARIANCE,
    DYNAMICS,
    NX,
    PLANNER,
    SCHEDULE,
    D,
    H,
    exact,
    linear,
    waves,
)
from torch import Tensor

from mpd_gym.diffusion.composition import (
    COMPOSITIONS,
    Parts,
    compose,
    inpaint,
    inpaint_denoiser,
    planner_only,
)
from mpd_gym.diffusion.samplers import (
    make_move,
    sample,
    with_history,
)
from mpd_gym.diffusion.schedule import make_schedule
from mpd_gym.types import Denoiser

MASK = torch.zeros(H, D, dtype=torch.bool)
MASK[0, :NX] = True
VALUES = torch.from_numpy(waves(1)[0]) / 3


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++"])
def test_inpainted_entries_hold_their_values_at_every_level(sampler: str) -> None:
    seen: list[Tensor] = []

    def recorded(denoiser: Denoiser) -> Denoiser:
        def denoise(trajectory: Tensor, k: int) -> Tensor:
            seen.append(trajectory)
            return denoiser(trajectory, k)

        return denoise

    for name in sorted(COMPOSITIONS):
        seen.clear()
        planner, dynamics = (
            with_history(
                sampler,
                inpaint_denoiser(recorded(linear(weights, columns)), MASK, VALUES),
                SCHEDULE.levels(),
                SCHEDULE,
            )
            for weights, columns in ((PLANNER, D), (DYNAMICS, NX))
        )
        built = Parts(planner, dynamics, SCHEDULE, NX, make_move(sampler))
        step = inpaint(compose(name, built), MASK, VALUES)
        start, *draws = (torch.from_numpy(wave) for wave in waves(30))
        kept: list[Tensor] = []
        result = sample(
            step,
            start,
            SCHEDULE.levels(),
            iter(draws).__next__,
            callback=lambda k, trajectory: kept.append(trajectory),  # noqa: B023
        )
        assert len(kept) == 12 and result is kept[-1]
        assert len(seen) == (12 if name == "planner_only" else 24)
        for trajectory in (*kept, *seen):
            assert torch.equal(trajectory[:, MASK], VALUES[:, MASK])
        assert not torch.equal(result[:, ~MASK], VALUES[:, ~MASK])


def test_inpainting_changes_the_rest_as_conditioning_does() -> None:
    """Holding the states of exact denoisers moves the free entries towards them."""
    schedule = make_schedule("cosine", 100)
    mask = torch.tensor([[True, True, False]])
    values = torch.tensor([[[0.7, 0.4, 0.0]]], dtype=torch.float64)
    step = inpaint(planner_only(Parts(exact(schedule, D), None, schedule, NX)), mask, values)
    zeros = torch.zeros(1, 1, 3, dtype=torch.float64)
    action = sample(step, zeros, schedule.levels(), lambda: zeros)[0, 0, 2].item()
    cross = COVARIANCE[2, :2] @ np.linalg.inv(COVARIANCE[:2, :2])
    assert np.sign(action) == np.sign(cross @ np.array([0.7, 0.4]))
