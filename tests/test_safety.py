"""Projection by control barrier functions: closed forms, and where states end."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpd_gym.agents.safediffuser import environment_units
from mpd_gym.datasets import fit_normalizer
from mpd_gym.diffusion import (
    VARIANTS,
    Parts,
    SafetyConfig,
    box_barrier,
    compose,
    function_barrier,
    make_schedule,
    normal_noise,
    projected,
    sample,
)
from mpd_gym.errors import ConfigError

INF = torch.inf
K = 30
SCHEDULE = make_schedule("cosine", K)


def box(low: list[float], high: list[float]) -> Any:
    return box_barrier(torch.tensor(low), torch.tensor(high))


def moved_to(target: Tensor) -> Any:
    """A step that goes to `target` wherever it starts."""
    return lambda trajectory, k, k_next, noise: target


def no_noise() -> Tensor:
    raise AssertionError("not drawn")


def outside_disc(states: Tensor) -> Tensor:
    return states.square().sum(-1) - 0.5**2


def draws(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def sampled(barrier: Any, config: SafetyConfig, nx: int = 2) -> tuple[Tensor, list[Tensor]]:
    """Guided samples of a planner whose data lie mostly outside of the set, and their path."""

    def planner(trajectory: Tensor, k: int) -> Tensor:
        return torch.full_like(trajectory, 0.9).clamp(-1, 1)

    step = projected(
        compose("planner_only", Parts(planner, None, SCHEDULE, nx)), barrier, nx, config
    )
    noise = normal_noise((16, 4, 3), torch.Generator().manual_seed(0))
    path: list[Tensor] = []
    final = sample(step, noise(), SCHEDULE.levels(), noise, lambda k, x: path.append(x))
    return final, path


def test_a_half_space_is_met_by_the_nearest_point() -> None:
    normal, offset = torch.tensor([3.0, 4.0]), 1.0

    def barrier(states: Tensor) -> tuple[Tensor, Tensor]:
        h = (states @ normal + offset)[..., None]
        return h, normal.expand(*states.shape[:-1], 1, 2)

    before, target = draws(50, 1, 2), 2 * draws(50, 2, 2)[:, 1:]
    found = projected(moved_to(target), barrier, 2)(before, 9, 8, no_noise)
    distance = ((target @ normal + offset) / 5.0)[..., None]  # signed, of the unprojected point
    expected = target - distance.clamp(max=0) * normal / 5.0
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_smaller_rate_approaches_the_boundary_by_that_share() -> None:
    barrier = box([-INF, -INF], [1.0, INF])
    before = torch.tensor([[[0.0, 5.0]], [[0.9, 5.0]], [[3.0, 5.0]]])
    target = torch.tensor([[[9.0, 2.0]], [[9.0, 2.0]], [[9.0, 2.0]]])
    step = projected(moved_to(target), barrier, 2, SafetyConfig(rate=0.25))
    found = step(before, 9, 8, no_noise)
    np.testing.assert_allclose(found[:, 0, 0], [0.25, 0.925, 2.5], rtol=1e-6)
    np.testing.assert_array_equal(found[:, 0, 1], [2.0, 2.0, 2.0])


def test_a_box_clips_and_leaves_what_is_inside_alone() -> None:
    target = 2 * draws(40, 3, 3)
    barrier = box([-0.5, -INF], [0.4, 1.0])
    found = projected(moved_to(target), barrier, 2)(draws(40, 3, 3), 9, 8, no_noise)
    low, high = torch.tensor([-0.5, -INF]), torch.tensor([0.4, 1.0])
    torch.testing.assert_close(found[..., :2], target[..., :2].clamp(low, high))
    assert torch.equal(found[..., 2:], target[..., 2:]), "actions are not projected"
    inside = (target[..., :2] > low) & (target[..., :2] < high)
    assert torch.equal(found[..., :2][inside], target[..., :2][inside])


def test_several_oblique_constraints_give_the_nearest_point_of_the_polytope() -> None:
    normals = torch.tensor([[1.0, 0.2], [0.3, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    offsets = torch.tensor([0.3, 0.2, 1.5], dtype=torch.float64)

    def barrier(states: Tensor) -> tuple[Tensor, Tensor]:
        return states @ normals.T + offsets, normals.expand(*states.shape[:-1], 3, 2)

    target = 3 * draws(30, 1, 2).double()
    found = projected(moved_to(target), barrier, 2)(torch.zeros_like(target), 9, 8, no_noise)
    assert (barrier(found)[0] > -1e-5).all()
    grid = torch.linspace(-4, 4, 401, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    points = points[(barrier(points)[0] >= 0).all(-1)]
    for row in range(len(target)):
        nearest = (points - target[row, 0]).norm(dim=-1).min()
        assert (found[row, 0] - target[row, 0]).norm() <= nearest + 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", ["box", "disc"])
def test_states_end_in_the_set(variant: str, shape: str) -> None:
    config = SafetyConfig(variant)
    barrier = box([-INF, -INF], [0.2, INF]) if shape == "box" else function_barrier(outside_disc)
    final, _ = sampled(barrier, config)
    assert (barrier(final[..., :2])[0] >= -1e-5).all()
    free, _ = sampled(box([-100.0, -INF], [INF, INF]), config)
    if shape == "box":
        assert (free[..., 0] > 0.2).any(), "without the constraint they do not"


def test_a_set_that_ends_inside_a_curve_is_met_too() -> None:
    def inside_disc(states: Tensor) -> Tensor:  # concave: the linear condition alone overshoots
        return 0.5**2 - states.square().sum(-1)

    final, _ = sampled(function_barrier(inside_disc), SafetyConfig())
    assert (inside_disc(final[..., :2]) > -1e-4).all()


def test_robust_keeps_its_margin_from_the_first_level_on() -> None:
    barrier = box([-INF, -INF], [0.2, INF])
    _, path = sampled(barrier, SafetyConfig("robust", margin=0.05))
    for states in path:
        assert (barrier(states[..., :2])[0] >= 0.05 - 1e-5).all()


def test_relaxed_binds_at_the_strict_levels_only() -> None:
    barrier = box([-INF, -INF], [0.2, INF])
    _, path = sampled(barrier, SafetyConfig("relaxed", slack=100.0, strict_levels=10))
    worst = [float(barrier(states[..., :2])[0].min()) for states in path]  # at levels K − 1 … 0
    assert min(worst[: K - 11]) < -0.1
    assert min(worst[K - 11 :]) >= -1e-5


def test_relaxed_pays_for_slack_as_much_as_for_distance() -> None:
    barrier = box([-INF, -INF], [0.0, INF])
    target = torch.tensor([[[3.0, 0.0]]])
    config = SafetyConfig("relaxed", slack=2.0, strict_levels=0)
    found = projected(moved_to(target), barrier, 2, config)(torch.zeros(1, 1, 2), 9, 8, no_noise)
    # least (x − 3)² + r² with −x >= −2 r: x = 3 · w² / (1 + w²)
    assert float(found[0, 0, 0]) == pytest.approx(3.0 * 4 / 5)


def test_time_varying_sets_shrink_to_the_set_itself() -> None:
    config = SafetyConfig("time_varying", looseness=0.7, tightening_level=5.0)
    bounds = [config.bound(k) for k in range(K + 1)]
    assert bounds[0] == 0.0
    assert bounds[K] == pytest.approx(-0.7, abs=1e-6)
    assert all(after < before for before, after in pairwise(bounds))
    barrier = box([-INF, -INF], [0.2, INF])
    _, path = sampled(barrier, config)
    for k, states in zip(range(K - 1, -1, -1), path, strict=True):
        assert (barrier(states[..., :2])[0] >= bounds[k] - 1e-5).all()


def test_where_nothing_binds_the_samples_are_those_without_a_projection() -> None:
    wide = box([-100.0, -INF], [100.0, INF])
    final, _ = sampled(wide, SafetyConfig())

    def planner(trajectory: Tensor, k: int) -> Tensor:
        return torch.full_like(trajectory, 0.9)

    noise = normal_noise((16, 4, 3), torch.Generator().manual_seed(0))
    step = compose("planner_only", Parts(planner, None, SCHEDULE, 2))
    torch.testing.assert_close(final, sample(step, noise(), SCHEDULE.levels(), noise))


def test_a_vanishing_gradient_leaves_the_state_where_it_is() -> None:
    barrier = function_barrier(outside_disc)
    target = torch.zeros(1, 1, 2)  # the centre, from where no way is the nearest
    found = projected(moved_to(target), barrier, 2)(torch.zeros(1, 1, 2), 1, 0, no_noise)
    assert torch.isfinite(found).all()


def test_functions_may_give_one_constraint_or_several() -> None:
    states = draws(3, 4, 2)
    one = function_barrier(outside_disc)(states)
    torch.testing.assert_close(one[0], outside_disc(states)[..., None])
    torch.testing.assert_close(one[1], 2 * states[..., None, :])
    two = function_barrier(lambda x: torch.stack((outside_disc(x), x[..., 1]), -1))(states)
    torch.testing.assert_close(two[0][..., 1], states[..., 1])
    torch.testing.assert_close(two[1][..., 1, :], torch.tensor([0.0, 1.0]).expand(3, 4, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "robus"}, "robust"),
        ({"rate": 0.0}, "rate"),
        ({"rate": 1.5}, "rate"),
        ({"margin": -1.0}, "margin"),
        ({"slack": float("inf")}, "slack"),
        ({"strict_levels": -1}, "strict_levels"),
    ],
)
def test_wrong_settings_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SafetyConfig(**change)


def test_wrong_boxes_are_refused() -> None:
    with pytest.raises(ConfigError, match="low < high"):
        box([1.0], [0.0])
    with pytest.raises(ConfigError, match="finite bound"):
        box([-INF], [INF])


@pytest.mark.parametrize("kind", ["minmax", "gaussian", "cdf"])
def test_differentiable_units_equal_the_normalizers(kind: str) -> None:
    data = np.random.default_rng(0).normal(size=(200, 3)) ** 3
    data[:, 2] = 4.0  # a constant
    normalizer = fit_normalizer(kind, data)
    low, high = normalizer.clip_range
    z = np.random.default_rng(1).uniform(low, high, size=(20, 3))
    units = environment_units(normalizer, torch.device("cpu"))
    point = torch.tensor(z, dtype=torch.float32, requires_grad=True)
    found = units(point)
    np.testing.assert_allclose(
        found.detach().numpy(), normalizer.unnormalize(z), rtol=1e-4, atol=1e-4
    )
    (gradient,) = torch.autograd.grad(found.sum(), point)
    step = 1e-4
    inner = np.clip(z, low + step, high - step)
    slopes = normalizer.unnormalize(inner + step) - normalizer.unnormalize(inner - step)
    if kind != "cdf":  # whose slope jumps at its knots
        np.testing.assert_allclose(gradient.numpy(), slopes / (2 * step), rtol=1e-3, atol=1e-3)
    outside = units(torch.tensor(high + 0.5, dtype=torch.float32))
    assert (outside[:2].numpy() > normalizer.unnormalize(high)[:2] + 1e-3).all()
