"""Causal denoisers: no row of a prediction depends on a later row of the noisy trajectory."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from helpers import TINY, source

from mpd_gym.agents.mpdiffuser import MPDiffuserAgent
from mpd_gym.models import DenoiserConfig, TrajectoryDenoiser, UnetConfig
from mpd_gym.models.temporal_unet import NORM_EPS, CumulativeNorm

HORIZON, ROWS = 16, 2
SIZES: dict[str, Any] = {"width": 8, "multipliers": (1, 2, 2), "groups": 4}


def network(causal: bool, **changes: Any) -> TrajectoryDenoiser:
    torch.manual_seed(0)
    unet = UnetConfig(**SIZES, causal=causal)
    return TrajectoryDenoiser(DenoiserConfig(3, 2, HORIZON, unet=unet, **changes)).double()


def rows_that_change(model: TrajectoryDenoiser, row: int) -> list[int]:
    """Rows of the prediction that differ after `row` of the input was changed."""
    trajectory = torch.randn(ROWS, HORIZON, 5, dtype=torch.float64)
    changed = trajectory.clone()
    changed[:, row] += 1.0
    known = (
        torch.full((ROWS,), 3),
        torch.randn(ROWS, 3, dtype=torch.float64),
        torch.zeros(ROWS, 0, dtype=torch.float64),
        torch.zeros(ROWS, 0, dtype=torch.float64),
    )
    with torch.no_grad():
        difference = (model(changed, *known) - model(trajectory, *known)).abs().amax(dim=(0, 2))
    return torch.nonzero(difference > 0).flatten().tolist()


@pytest.mark.parametrize("output", ["trajectory", "observations"])
@pytest.mark.parametrize("initial_state", ["film", "inpaint"])
def test_no_row_depends_on_a_later_one(
    output: Literal["trajectory", "observations"], initial_state: Literal["film", "inpaint"]
) -> None:
    model = network(True, output=output, initial_state=initial_state)
    for row in range(HORIZON):
        assert rows_that_change(model, row) == list(range(row, HORIZON))


def test_the_last_step_is_normalised_as_a_whole_series() -> None:
    torch.manual_seed(0)
    hidden = 3 * torch.randn(ROWS, 8, HORIZON, dtype=torch.float64) + 1
    found = CumulativeNorm(4, 8).double()(hidden)
    for steps in (1, 5, HORIZON):
        whole = torch.nn.functional.group_norm(hidden[..., :steps], 4, eps=NORM_EPS)
        torch.testing.assert_close(found[..., steps - 1], whole[..., -1])


def test_the_usual_network_sees_the_future() -> None:
    assert min(rows_that_change(network(False), HORIZON - 1)) < HORIZON - 1


def test_it_has_as_many_weights() -> None:
    counts = {sum(part.numel() for part in network(one).parameters()) for one in (False, True)}
    assert len(counts) == 1


def test_an_agent_of_causal_networks_learns_acts_and_is_kept(tmp_path: Any) -> None:
    from dataclasses import replace

    config = replace(TINY, unet=replace(TINY.unet, causal=True))
    agent = MPDiffuserAgent.fit(source("LQR-v0"), config, progress=False)
    agent.save(tmp_path / "causal.safetensors")
    again = MPDiffuserAgent.load(tmp_path / "causal.safetensors", device="cpu")
    assert again.config.unet.causal
    for one, other in zip(agent.predict([0.1, 0.0])[0], again.predict([0.1, 0.0])[0], strict=True):
        assert one == other
