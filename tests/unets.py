"""Denoisers of many shapes, their inputs, and how far apart two of them are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpd_gym.models import DenoiserConfig, TrajectoryDenoiser, UnetConfig
from mpd_gym.models.backends.interface import InferenceNetwork
from mpd_gym.models.backends.library import Level, levels

SMALL = UnetConfig(width=16, multipliers=(1, 2, 4), groups=4)
CONFIGS = {
    "laptop": DenoiserConfig(6, 2, 16, conditions=(("return", 1),), unet=SMALL),
    "dynamics": DenoiserConfig(
        3, 1, 12, output="observations", conditions=(("goal", 2), ("cost", 1)), unet=SMALL
    ),
    "one level": DenoiserConfig(5, 3, 7, unet=UnetConfig(width=8, multipliers=(1,), groups=2)),
    "falling": DenoiserConfig(
        2, 2, 2, initial_state="inpaint", unet=UnetConfig(width=12, multipliers=(3, 1), groups=3)
    ),
    "no kernel": DenoiserConfig(2, 1, 8, unet=UnetConfig(16, (1, 1), kernel_size=1, groups=1)),
    "states only": DenoiserConfig(4, 0, 8, null="learned", conditions=(("return", 1),), unet=SMALL),
    # more channels than a product takes at a time, and more weights than a cache holds
    "wide": DenoiserConfig(11, 3, 8, unet=UnetConfig(width=160, multipliers=(1, 4))),
}
CAUSAL = {
    "causal": DenoiserConfig(
        4, 2, 16, unet=UnetConfig(width=16, multipliers=(1, 2, 2), groups=4, causal=True)
    ),
    "one causal level": DenoiserConfig(3, 1, 5, unet=UnetConfig(8, (2,), groups=2, causal=True)),
    "causal, no kernel": DenoiserConfig(
        2, 1, 8, unet=UnetConfig(16, (1, 1), kernel_size=1, groups=1, causal=True)
    ),
}


def found_levels() -> list[Level]:
    """The compiled code that this machine can run, whatever the environment says."""
    try:
        return levels()
    except OSError:
        return []


LEVELS = {level.name.decode(): level for level in found_levels()}
needs_c = pytest.mark.skipif(not LEVELS, reason="no compiled code")
needs_pairs = pytest.mark.skipif(
    not any(level.pairs for level in LEVELS.values()), reason="no bfloat16 in compiled code"
)


def network(name: str = "laptop", seed: int = 0) -> TrajectoryDenoiser:
    """A network none of whose weights has a special value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = TrajectoryDenoiser((CONFIGS | CAUSAL)[name]).eval()
        with torch.no_grad():
            for weight in found.parameters():
                weight += 0.05 * torch.randn_like(weight)
    return found


def inputs(config: DenoiserConfig, groups: int, rows: int) -> tuple[Tensor, list[Tensor]]:
    """A trajectory of so many rows, and conditioning of so many groups."""
    generator = torch.Generator().manual_seed(groups + rows)
    present = torch.ones(groups, len(config.conditions))
    present[groups // 2 :] = 0
    conditioning = [
        torch.randint(1, 50, (groups,), generator=generator),
        torch.randn(groups, config.observation_dim, generator=generator),
        torch.randn(groups, config.condition_dim, generator=generator),
        present,
    ]
    shape = (rows, config.horizon, config.trajectory_dim)
    return torch.randn(shape, generator=generator), conditioning


@torch.no_grad()
def difference(plain: TrajectoryDenoiser, other: InferenceNetwork, groups: int, rows: int) -> float:
    """Largest difference of two networks, relative to the largest output of the plain one."""
    trajectory, conditioning = inputs(plain.config, groups, rows)
    expected, found = (
        part.denoise(trajectory, part.modulations(part.embed(*conditioning)))
        for part in (plain, other)
    )
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return relative(found, expected)


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected number."""
    return float((found - expected).abs().max() / expected.abs().max())
